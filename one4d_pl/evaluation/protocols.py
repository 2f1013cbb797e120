"""Published numbers differ by how they were scored; each way has a name that is printed beside every number.

monst3r     scale and shift by Adam at 1e-4 for 1000 steps, which hardly moves: close to median scaling, and dependent
            on the prediction's unit; Sintel cut at 70 m, Bonn not
geo4d       the same by Adam at 1e-2 for 5000 steps, which converges; Sintel and Bonn cut at 70 m; fitted on pixels
            that the prediction itself calls valid
one4d       geo4d's with the exact L1 minimum instead of Adam (the paper: "following MonST3R and Geo4D")
scale_only  one scale, no shift (CUT3R's tables), exact L1; limits as monst3r

In all of them: one fit per sequence in depth; pixels with 0 < truth < 70 m; the depth mean over sequences weighs each
by its scored pixels; the camera mean is unweighted over the sequences that evo can align (MonST3R drops the others,
Geo4D records 0 for them and averages what is not 0). The mean over all sequences is always given beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from one4d_pl.metrics.depth import Alignment

FAR = 70.0  # metres


@dataclass(frozen=True)
class Protocol:
    """One named way to turn predictions into numbers."""

    name: str
    alignment: Alignment
    use_fit_valid: bool  # fit on the prediction's own valid pixels where it has them; errors on all scored ones
    post_clip: dict[str, float] = field(default_factory=dict)  # benchmark -> upper limit of the aligned prediction
    max_depth: dict[str, float] = field(default_factory=lambda: {"sintel": FAR, "bonn": FAR})

    def describe(self, benchmark: str) -> str:
        """The combination in words, for tables."""
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
        Protocol("monst3r", "scale_shift_monst3r", False, {"sintel": FAR}),
        Protocol("geo4d", "scale_shift_geo4d", True, {"sintel": FAR, "bonn": FAR}),
        Protocol("one4d", "scale_shift", True, {"sintel": FAR, "bonn": FAR}),
        Protocol("scale_only", "scale", False, {"sintel": FAR}),
    )
}
