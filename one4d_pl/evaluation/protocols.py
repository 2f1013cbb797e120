"""The ways in which published numbers were scored; the name of one is printed beside every number.

monst3r     scale and shift by Adam at 1e-4 for at most 1000 steps, which hardly move them: close to
            median scaling, and dependent on the prediction's unit; Sintel cut at 70 m, Bonn not
geo4d       the same by Adam at 1e-2 for at most 5000 steps, which comes near the minimum; Sintel
            and Bonn cut at 70 m; fitted on pixels that the prediction itself calls valid
cut3r       one scale, no shift, by ten reweighted least squares, at least 0.001; limits as monst3r
one4d       geo4d's with the exact L1 minimum instead of Adam (One4D: "following MonST3R and Geo4D")
scale_only  cut3r's with the exact L1 minimum: no published table uses it; what cut3r would give if
            it converged

monst3r, geo4d and cut3r are the published computations themselves, early stops included, in float32; where a repository
reads the truth as float64 (Bonn in MonST3R and CUT3R), in float64. See `metrics.published_fits`.

In all of them: one fit per sequence in depth; pixels with 0 < truth < 70 m; the depth mean over sequences weighs each
by its scored pixels; the camera mean is unweighted over the sequences that evo can align (MonST3R drops the others,
Geo4D records 0 for them and averages what is not 0). The mean over all sequences is always given beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from one4d_pl.metrics.depth import Alignment
from one4d_pl.metrics.published_fits import ADAM, MIN_SCALE

FAR = 70.0  # metres
EXACT: tuple[Alignment, ...] = ("scale", "scale_shift")


@dataclass(frozen=True)
class Protocol:
    """One named way to turn predictions into numbers."""

    name: str
    alignment: Alignment
    use_fit_valid: bool  # fit on pixels that the prediction calls valid, if it does; errors on all
    post_clip: dict[str, float] = field(default_factory=dict)  # benchmark -> upper limit of the aligned prediction
    max_depth: dict[str, float] = field(default_factory=lambda: {"sintel": FAR, "bonn": FAR})
    float64_truth: tuple[str, ...] = ()  # benchmarks whose truth the published fit reads as float64

    @property
    def lowest_scale(self) -> float | None:
        """Return the smallest scale that the alignment gives; None = no limit."""
        return MIN_SCALE if self.alignment == "scale_cut3r" else 0.0 if self.alignment in EXACT else None

    @property
    def needs_metres(self) -> bool:
        """Tell whether the fit depends on the prediction's unit.

        It does where its steps or limits have a fixed size.
        """
        return self.alignment in (*ADAM, "scale_cut3r")

    def describe(self, benchmark: str) -> str:
        """Describe the protocol on a benchmark in words, for tables."""
        clip, limit = self.post_clip.get(benchmark), self.max_depth.get(benchmark)
        parts = [
            f"depth alignment {self.alignment} per sequence"
            + (" on the prediction's valid pixels" if self.use_fit_valid else ""),
            "all true depths scored" if limit is None else f"true depth < {limit:g} scored",
            "aligned depth not cut" if clip is None else f"aligned depth cut at {clip:g}",
            "mean weighted by pixels",
            "cameras: Sim(3), unweighted mean over sequences that evo can align",
        ]
        return f"{self.name}: " + "; ".join(parts)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("monst3r", "scale_shift_monst3r", False, {"sintel": FAR}, float64_truth=("bonn",)),
        Protocol("geo4d", "scale_shift_geo4d", True, {"sintel": FAR, "bonn": FAR}),
        Protocol("cut3r", "scale_cut3r", False, {"sintel": FAR}, float64_truth=("bonn",)),
        Protocol("one4d", "scale_shift", True, {"sintel": FAR, "bonn": FAR}),
        Protocol("scale_only", "scale", False, {"sintel": FAR}),
    )
}
