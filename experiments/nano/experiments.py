"""The ten claims of `make nano`, the runs that decide them, and the tables that show both.

A run is one training from scratch by configs/nano.yaml, or one sampling of the adapters that the training of `dlc` with
the same seed made. `dlc` is One4D as that config has it; every other run changes what its name says and nothing else.
Claims, margins and seeds stand here before any run; `other_clip` and `links_zeroed` are measured beside them and tell
whether pointmaps follow the frames that are shown, and by which way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from one4d_pl.types import Task

Kind = Literal["train", "sample", "references"]

SEEDS = 3  # of the trainings that most claims rest on, and of samplings
FEW_SEEDS = 2  # of the others
REFERENCE = "dlc"
CONCAT_RANK = 96  # one LoRA with as many parameters as two of rank 40 and five links
LINKS_ZEROED, OTHER_CLIP = "links_zeroed", "other_clip"
ALL_TASKS: tuple[Task, ...] = ("video", "image")  # that are measured: all frames given, the first alone


@dataclass(frozen=True)
class Run:
    """A training of configs/nano.yaml, a sampling of the reference's adapters, or what both are compared with."""

    name: str
    overrides: tuple[str, ...] = ()
    seeds: int = SEEDS  # the seed is that of the training and of the noise
    kind: Kind = "train"
    given: float | None = None  # share of given frames; None = video and image
    broken: str | None = None  # sample: LINKS_ZEROED, or OTHER_CLIP, whose frames and caption are given
    trained: tuple[Task, ...] = ALL_TASKS  # train: those of ALL_TASKS that it trains

    def __post_init__(self) -> None:
        assert self.broken in (None, LINKS_ZEROED, OTHER_CLIP)
        assert self.kind == "sample" or not (self.broken or self.given)


@dataclass(frozen=True)
class Claim:
    """The claim that run `better` beats run `than` on `metric`, or is worse by at most `slack` (a share, or dB)."""

    text: str
    metric: str
    better: str
    than: str
    slack: float = 0.0
    source: str = ""  # in the paper

    @property
    def margin(self) -> str:
        """Return in words how much worse `better` may be."""
        if not self.slack:
            return "none"
        return f"{self.slack:g} dB" if in_decibels(self.metric) else f"{self.slack:.0%}".replace("%", " %")

    @property
    def seeds(self) -> str:
        """List the seeds that both runs have."""
        return ", ".join(map(str, range(min(RUNS[self.better].seeds, RUNS[self.than].seeds))))


@dataclass(frozen=True)
class Experiment:
    """A table of the report: a question and the runs that answer it."""

    name: str
    question: str
    runs: tuple[str, ...]
    metrics: tuple[str, ...]  # columns


def in_decibels(metric: str) -> bool:
    """Tell whether a metric is in dB, where higher is better. All others are errors, losses or distances."""
    return metric.endswith("_db")


def _guidance(scale: int) -> str:
    return f"sampler.guidance={{text: {scale}, image: {scale}, sparse: {scale}, video: {scale}}}"


def _masking(text: float, image: float, sparse: float, video: float) -> str:
    return f"masking={{text_prob: {text}, image_prob: {image}, sparse_prob: {sparse}, video_prob: {video}}}"


def _concat(coupling: str) -> tuple[str, ...]:
    return f"dlc.coupling={coupling}", "dlc.num_links=0", f"dlc.rank={CONCAT_RANK}"


RUNS = {
    run.name: run
    for run in (
        Run(REFERENCE),
        Run("width", _concat("width")),
        Run("channel", _concat("channel")),
        Run("links_0", ("dlc.num_links=0",), FEW_SEEDS),
        Run("links_1", ("dlc.num_links=1",), FEW_SEEDS),
        Run("reconstruction_only", (_masking(0, 0, 0, 1),), FEW_SEEDS, trained=("video",)),
        Run("generation_only", (_masking(0.3, 0.7, 0, 0),), FEW_SEEDS, trained=("image",)),
        Run("given_0.5", kind="sample", given=0.5),
        *(Run(f"guidance_{scale}", (_guidance(scale),), kind="sample") for scale in (4, 6)),
        Run(OTHER_CLIP, kind="sample", given=1, broken=OTHER_CLIP),
        Run(LINKS_ZEROED, kind="sample", given=1, broken=LINKS_ZEROED),
        Run("references", seeds=1, kind="references"),
    )
}

ERROR, MOVING, IMAGE_ERROR = "video.rel_error", "video.rel_error_moving", "image.rel_error"
GIVEN, HIDDEN, FD = "video.given_db", "image.hidden_db", "image.fd_vae"
XYZ, RGB = "val.xyz", "val.rgb"

LABELS = {
    ERROR: "video to 4D: point error",
    MOVING: "moving points",
    IMAGE_ERROR: "image to 4D: point error",
    HIDDEN: "image to 4D: hidden frames, dB",
    FD: "image to 4D: frames' Fréchet distance",
    GIVEN: "given frames, dB",
    "video.hidden_db": "hidden frames, dB",
    XYZ: "pointmaps' loss",
    RGB: "frames' loss",
}

CLAIMS = (
    Claim("points are better by DLC than along the width", ERROR, REFERENCE, "width", source="Fig. 3"),
    Claim("points are better by DLC than along channels", ERROR, REFERENCE, "channel", source="Fig. 2"),
    Claim("frames from one image are better by DLC than along channels", FD, REFERENCE, "channel", source="Fig. 2"),
    Claim("frames from one image are better by DLC than along the width", FD, REFERENCE, "width", source="Fig. 3"),
    Claim("points are better with five links than with none", ERROR, REFERENCE, "links_0", source="Eq. 9"),
    Claim("points are better with five links than with one", ERROR, REFERENCE, "links_1", source="sec. 3.2"),
    Claim(
        "a model of all tasks reconstructs like one of reconstruction alone",
        ERROR, REFERENCE, "reconstruction_only", 0.05, "Tables 3-4",
    ),
    Claim(
        "a model of all tasks generates frames like one of generation alone",
        HIDDEN, REFERENCE, "generation_only", 0.1, "Tables 3-4",
    ),
    Claim("4 of 9 given frames do nearly as well as all", ERROR, "given_0.5", REFERENCE, 0.1, "Table 5"),
    Claim("guidance 4 reconstructs better than 6", ERROR, "guidance_4", "guidance_6", source="Table 6"),
)  # fmt: skip

EXPERIMENTS = (
    Experiment(
        "coupling",
        "How should frames and pointmaps share one transformer: by Decoupled LoRA Control (DLC), or joined along the "
        "width or along channels?",
        (REFERENCE, "width", "channel", "references"),
        (ERROR, MOVING, HIDDEN, FD, GIVEN, XYZ, RGB),
    ),
    Experiment(
        "links",
        "How many control links? And do pointmaps follow the frames that are shown, by these links?",
        (REFERENCE, "links_0", "links_1", LINKS_ZEROED, OTHER_CLIP, "references"),
        (ERROR, MOVING, HIDDEN, FD, XYZ, RGB),
    ),
    Experiment(
        "unified",
        "What does one model for all tasks cost beside a model for each?",
        (REFERENCE, "reconstruction_only", "generation_only", "references"),
        (ERROR, MOVING, IMAGE_ERROR, HIDDEN, FD),
    ),
    Experiment(
        "sparsity",
        "What do points cost where not all frames are given?",
        (REFERENCE, "given_0.5", "references"),
        (ERROR, MOVING, "video.hidden_db"),
    ),
    Experiment(
        "guidance",
        "How much guidance? (`dlc` is sampled with the tiny scale's)",
        (REFERENCE, "guidance_4", "guidance_6", "references"),
        (ERROR, MOVING, IMAGE_ERROR, HIDDEN, FD),
    ),
)
