"""The questions of `make nano`, the runs that answer them, and the answers that the paper claims.

A run is one training, or one measurement of finished adapters; several experiments may use the same one. `dlc` is One4D
as configs/nano.yaml has it, with three seeds; every other training from scratch changes what its name says and nothing
else. No run from scratch gets so far that pointmaps follow their frames. So that is studied on adapters that do follow:
the shipped ones, with links zeroed, or trained further on one task or on all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["train", "sample", "references", "vae", "vae_rgb"]

SEEDS = 3  # of trainings whose verdict depends on chance
FEW_SEEDS = 2  # of trainings whose difference is large, and of samplings
REFERENCE = "dlc"
SHIPPED = "shipped"  # the shipped adapters; guidance 1, that is none, where frames are given
EVERY_TASK = "all_tasks"
CONCAT_RANK = 96  # one LoRA with as many parameters as two of rank 40 and five links
BLOCKS_WITH_LINKS = range(5)  # of the shipped adapters
LINKS_ZEROED = {  # Run.broken -> pattern of names of the links' weights
    "links_zeroed": "*",
    "links_to_frames_zeroed": "*.xyz_to_rgb.*",
    **{f"link_{block}_zeroed": f"{block}.*" for block in BLOCKS_WITH_LINKS},
}
OTHER_CLIP = "other_clip"


@dataclass(frozen=True)
class Run:
    """A training of configs/nano.yaml or of a VAE (vae_rgb: without pointmaps), or sampling from finished adapters."""

    name: str
    overrides: tuple[str, ...] = ()
    seeds: int = 1  # number of seeds, of the training or, where nothing is trained, of the noise
    kind: Kind = "train"
    given: float | None = None  # share of given frames, 0 = the first alone; None = video and image
    broken: str | None = None  # sample: a key of LINKS_ZEROED, or OTHER_CLIP: its frames are given
    from_adapters: bool = False  # train: start from finished adapters and not from scratch
    open_choice: bool = False  # another choice where the paper makes none
    own_target: bool = False  # it encodes pointmaps differently, so its loss compares with no other's

    def __post_init__(self) -> None:
        assert self.broken in (None, OTHER_CLIP, *LINKS_ZEROED)
        assert self.kind == ("train" if self.from_adapters else "sample" if self.broken else self.kind)


@dataclass(frozen=True)
class Claim:
    """The claim that run `better` beats run `than` on `metric`, or is worse by at most `slack` (a share, or dB)."""

    text: str
    metric: str
    better: str
    than: str
    slack: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """A question, the paper's claim, and the runs that answer."""

    name: str
    question: str
    claim: str
    source: str
    runs: tuple[str, ...]
    metrics: tuple[str, ...]  # columns of its table
    claims: tuple[Claim, ...]
    drawn: tuple[str, ...]  # metrics of its figure: bars, but curves for the pointmaps' loss


def in_decibels(metric: str) -> bool:
    """Tell whether a metric is in dB, where higher is better. All others are errors or distances."""
    return metric.endswith("_db")


def _guidance(scale: int) -> str:
    return f"sampler.guidance={{text: {scale}, image: {scale}, sparse: {scale}, video: {scale}}}"


def _masking(text: float, image: float, sparse: float, video: float) -> str:
    return f"masking={{text_prob: {text}, image_prob: {image}, sparse_prob: {sparse}, video_prob: {video}}}"


GENTLE = ("optim.lr=3.0e-4", "optim.warmup_steps=10")  # for further training of adapters


def _open_choice(name: str, *overrides: str, seeds: int = 1, own_target: bool = False) -> Run:
    return Run(name, overrides, seeds, given=1, open_choice=True, own_target=own_target)


BENT_POWER = 0.5
STANDARDISED, BENT = "dlc.standardise_xyz=true", f"data.pointmap_power={BENT_POWER}"
CEILINGS = {"ceiling": 1.0, "ceiling_bent": BENT_POWER}  # name -> data.pointmap_power

RUNS = {
    run.name: run
    for run in (
        Run("references", kind="references"),
        Run(REFERENCE, seeds=SEEDS),
        Run("channel", ("dlc.coupling=channel", "dlc.num_links=0", f"dlc.rank={CONCAT_RANK}"), SEEDS),
        Run("width", ("dlc.coupling=width", "dlc.num_links=0", f"dlc.rank={CONCAT_RANK}"), SEEDS),
        Run("links_0", ("dlc.num_links=0",), FEW_SEEDS),
        Run("links_1", ("dlc.num_links=1",)),
        Run("links_3", ("dlc.num_links=3",)),
        Run("links_one_way", ("dlc.link_direction=rgb_to_xyz",), FEW_SEEDS),
        Run("links_3_early", ("dlc.link_blocks=[0,1,2]",)),
        Run("links_3_late", ("dlc.link_blocks=[3,4,5]",)),
        Run(EVERY_TASK, GENTLE, SEEDS, from_adapters=True),
        Run("reconstruction_only", (*GENTLE, _masking(0, 0, 0, 1)), SEEDS, from_adapters=True),
        Run("generation_only", (*GENTLE, _masking(0.3, 0.7, 0, 0)), SEEDS, from_adapters=True),
        Run("synthetic_only", ("data.sources=[{path: data/toy_nano/train_synthetic}]",), FEW_SEEDS),
        Run(SHIPPED, kind="sample", seeds=FEW_SEEDS),
        *(Run(f"given_{share:g}", kind="sample", seeds=FEW_SEEDS, given=share) for share in (0.5, 0.25, 0)),
        Run("links_zeroed", kind="sample", seeds=FEW_SEEDS, given=1, broken="links_zeroed"),
        Run("links_to_frames_zeroed", kind="sample", seeds=FEW_SEEDS, broken="links_to_frames_zeroed"),
        *(
            Run(f"link_{block}_zeroed", kind="sample", given=1, broken=f"link_{block}_zeroed")
            for block in BLOCKS_WITH_LINKS
        ),
        Run("other_clip", kind="sample", seeds=FEW_SEEDS, given=1, broken=OTHER_CLIP),
        *(Run(f"guidance_{n}", (_guidance(n),), FEW_SEEDS, "sample") for n in (2, 4, 6)),
        *(Run(f"steps_{n}", (f"sampler.steps={n}",), FEW_SEEDS, "sample") for n in (1, 4, 14)),
        Run("steps_49", ("sampler.steps=49",), 1, "sample"),
        _open_choice("standardised", STANDARDISED, own_target=True),
        _open_choice("bent", BENT, own_target=True),
        _open_choice("standardised_and_bent", STANDARDISED, BENT, seeds=FEW_SEEDS, own_target=True),
        _open_choice("shared_patch_embedding", "dlc.xyz_patch_embedding=false"),
        _open_choice("z_offset", "data.z_offset=true", own_target=True),
        _open_choice("far_limit_5", "data.far_limit=5", own_target=True),
        *(_open_choice(f"rank_{n}", f"dlc.rank={n}") for n in (4, 64)),
        _open_choice("lora_scale_2", "dlc.lora_scale=2"),
        *(_open_choice(f"shift_{n}", f"flow.shift={n}") for n in (1, 5)),
        _open_choice("separate_sigma", "flow.separate_sigma=true"),
        _open_choice("xyz_weight_2", "flow.xyz_weight=2"),
        _open_choice("link_lr_quarter", "optim.link_lr_width=64"),  # of 256 channels
        Run("vae_both", kind="vae", seeds=SEEDS),
        Run("vae_rgb_only", kind="vae_rgb", seeds=SEEDS),
    )
}

OPEN_KNOBS = tuple(name for name, run in RUNS.items() if run.open_choice)

ERROR, MOVING, EDGES = "video.rel_error", "video.rel_error_moving", "video.rel_error_edges"
GIVEN, HIDDEN, FD = "video.given_db", "image.hidden_db", "image.fd_vae"
VAE_ERROR, XYZ, RGB = "vae.rel_error", "val.xyz", "val.rgb"

EXPERIMENTS = (
    Experiment(
        "coupling",
        "How should frames and pointmaps share one transformer?",
        "Joining along channels degrades both, along the width aligns them weakly; Decoupled LoRA Control keeps frames "
        "and follows them.",
        "Fig. 2-3",
        (REFERENCE, "channel", "width", "references"),
        (ERROR, MOVING, EDGES, HIDDEN, FD, GIVEN, XYZ, RGB),
        tuple(
            Claim(f"{text} {than}", metric, REFERENCE, other)
            for metric, text in (
                (GIVEN, "given frames are kept better than"),
                (HIDDEN, "hidden frames are nearer to the true ones than"),
                (FD, "hidden frames' distribution is better than"),
                (RGB, "frames' loss is lower than"),
                (ERROR, "pointmaps are better than"),
                (XYZ, "pointmaps' loss is lower than"),
            )
            for other, than in (("channel", "by channels"), ("width", "along the width"))
        ),
        (ERROR, XYZ),
    ),
    Experiment(
        "links",
        "Are control links needed, how many, both ways, and where? (from scratch; then the shipped adapters, broken)",
        "A few links (5) let each branch steer the other, pixel by pixel.",
        "Eq. 9, sec. 3.2",
        (
            *(REFERENCE, "links_0", "links_1", "links_3", "links_one_way", "links_3_early", "links_3_late"),
            *(SHIPPED, "links_zeroed", "links_to_frames_zeroed"),
            *(f"link_{block}_zeroed" for block in BLOCKS_WITH_LINKS),
            *("other_clip", "references"),
        ),
        (ERROR, MOVING, HIDDEN, XYZ, RGB),
        (
            Claim("from scratch, five links lower the point error below none's", ERROR, REFERENCE, "links_0"),
            Claim("from scratch, five links lower the pointmaps' loss below none's", XYZ, REFERENCE, "links_0"),
            Claim("five links learn faster than one", XYZ, REFERENCE, "links_1"),
            Claim("five links learn faster than three", XYZ, REFERENCE, "links_3"),
            Claim("both ways learn pointmaps faster than one way", XYZ, REFERENCE, "links_one_way"),
            Claim("both ways cost the frames' loss less than 1 %", RGB, REFERENCE, "links_one_way", 0.01),
            Claim("three spread links learn faster than three early ones", XYZ, "links_3", "links_3_early"),
            Claim("three spread links learn faster than three late ones", XYZ, "links_3", "links_3_late"),
            Claim("pointmaps follow the clip that is shown", ERROR, SHIPPED, "other_clip"),
            Claim("pointmaps rely on the links", ERROR, SHIPPED, "links_zeroed"),
            Claim("pointmaps rely on the links' way to the frames", ERROR, SHIPPED, "links_to_frames_zeroed"),
            Claim("hidden frames rely on the links' way to the frames", HIDDEN, SHIPPED, "links_to_frames_zeroed"),
            *(
                Claim(f"pointmaps rely on the link after block {block}", ERROR, SHIPPED, f"link_{block}_zeroed")
                for block in BLOCKS_WITH_LINKS
            ),
        ),
        (ERROR, XYZ),
    ),
    Experiment(
        "unified",
        "What do the shipped adapters, of all tasks, gain by more training on one alone, and what do they forget?",
        "One model does both at once, near models made for one.",
        "Tables 3-4",
        (SHIPPED, EVERY_TASK, "reconstruction_only", "generation_only", "references"),
        (ERROR, MOVING, "image.rel_error", HIDDEN, FD),
        (
            Claim("point error within 2 % of reconstruction alone", ERROR, EVERY_TASK, "reconstruction_only", 0.02),
            Claim("reconstructs better than generation alone", ERROR, EVERY_TASK, "generation_only"),
            Claim("hidden frames within 0.1 dB of generation alone", HIDDEN, EVERY_TASK, "generation_only", 0.1),
            Claim("frames' distribution within 2 % of generation alone", FD, EVERY_TASK, "generation_only", 0.02),
            Claim("hidden frames are better than by reconstruction alone", HIDDEN, EVERY_TASK, "reconstruction_only"),
            Claim("their distribution is better than by it", FD, EVERY_TASK, "reconstruction_only"),
        ),
        (ERROR, FD),
    ),
    Experiment(
        "sparsity",
        "Does geometry get worse gracefully where fewer frames are given? (shipped adapters)",
        "Accuracy falls slowly from all frames to a tenth of them.",
        "Table 5",
        (SHIPPED, "given_0.5", "given_0.25", "given_0", "references"),
        (ERROR, MOVING, "video.hidden_db"),
        (
            Claim("4 of 9 frames: within 10 % of all", ERROR, "given_0.5", SHIPPED, 0.1),
            Claim("2 of 9 frames, first and last: within 10 % of all", ERROR, "given_0.25", SHIPPED, 0.1),
            Claim("all frames are better than the first alone", ERROR, SHIPPED, "given_0"),
        ),
        (ERROR,),
    ),
    Experiment(
        "guidance",
        "How much guidance, how many sampling steps? (shipped adapters: 3 steps, guidance 1, that is none)",
        "Guidance 4 is better than 6 for reconstruction; 50 steps.",
        "Table 6, sec. 4.1",
        (SHIPPED, "guidance_2", "guidance_4", "guidance_6", "steps_1", "steps_4", "steps_14", "steps_49"),
        (ERROR, MOVING, HIDDEN, FD),
        (
            Claim("guidance 4 is better than 6", ERROR, "guidance_4", "guidance_6"),
            Claim("guidance 4 is better than 6 for frames' distribution", FD, "guidance_4", "guidance_6"),
            Claim("guidance 1 (none) is better than 4", ERROR, SHIPPED, "guidance_4"),
            Claim("49 steps are better than 14", ERROR, "steps_49", "steps_14"),
            Claim("14 steps are better than 4", ERROR, "steps_14", "steps_4"),
            Claim("4 steps are better than 1", ERROR, "steps_4", "steps_1"),
            Claim("49 steps are better than 14 for frames' distribution", FD, "steps_49", "steps_14"),
            Claim("14 steps are better than 4 for frames' distribution", FD, "steps_14", "steps_4"),
        ),
        (ERROR, FD),
    ),
    Experiment(
        "data",
        "Do noisy clips with pseudo cameras beside the synthetic ones help?",
        "Synthetic and real clips together are the training mixture.",
        "sec. 4.1",
        (REFERENCE, "synthetic_only", "references"),
        (ERROR, MOVING, HIDDEN, XYZ, RGB),
        (
            Claim("the mixture is better on clean clips", ERROR, REFERENCE, "synthetic_only"),
            Claim("its pointmaps' loss is lower there", XYZ, REFERENCE, "synthetic_only"),
        ),
        (ERROR, XYZ),
    ),
    Experiment(
        "vae",
        "Must a video VAE have seen pointmaps to carry them?",
        "Wan's VAE, made for RGB, encodes pointmaps as well.",
        "sec. 3.1",
        ("vae_both", "vae_rgb_only", "references"),
        (VAE_ERROR, "vae.rel_error_moving", "vae.given_db"),
        (
            Claim("a VAE that saw frames alone is within 10 %", VAE_ERROR, "vae_rgb_only", "vae_both", 0.1),
            Claim("seeing twice as many frames, it keeps them better", "vae.given_db", "vae_rgb_only", "vae_both"),
        ),
        (VAE_ERROR,),
    ),
    Experiment(
        "open",
        "What the paper leaves open: does another choice do better than ours?",
        "None; each line says whether the other choice is better.",
        "not in the paper",
        (REFERENCE, *OPEN_KNOBS, "references"),
        (ERROR, MOVING, XYZ, RGB),
        (
            *(Claim(f"{name} is better", ERROR, name, REFERENCE) for name in OPEN_KNOBS),
            *(Claim(f"{name} learns faster", XYZ, name, REFERENCE) for name in OPEN_KNOBS if not RUNS[name].own_target),
        ),
        (ERROR, XYZ),
    ),
)
