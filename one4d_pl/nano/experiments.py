"""What `make nano` asks, of which runs, and which answer the paper claims.

A run is one training, or one measuring of adapters that exist; several experiments may look at the same one. `dlc` is
One4D as configs/nano.yaml has it, three seeds; every other training from scratch changes what its name says and nothing
else. No run from scratch gets so far that pointmaps follow their frames. Questions about following are put to adapters
that do: the shipped ones, with links zeroed, and trained on for one task or for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["train", "sample", "references", "vae", "vae_rgb"]

SEEDS = 3  # of trainings, where a verdict depends on chance
FEW_SEEDS = 2  # of trainings whose difference is large, and of samplings
REFERENCE = "dlc"
CONCAT_RANK = 96  # one LoRA with as many parameters as two of rank 40 and five links
BLOCKS_WITH_LINKS = range(5)  # of the shipped adapters
LINKS_ZEROED = {  # Run.broken -> which of the links' weights, by what their names contain
    "links_zeroed": "",
    "links_to_frames_zeroed": "xyz_to_rgb",
    **{f"link_{block}_zeroed": f"{block}." for block in BLOCKS_WITH_LINKS},
}


@dataclass(frozen=True)
class Run:
    """One training of configs/nano.yaml or of a VAE (vae_rgb: without pointmaps), or one sampling from adapters."""

    name: str
    overrides: tuple[str, ...] = ()
    seeds: int = 1  # of the training; of the noise where nothing is trained
    kind: Kind = "train"
    given: float | None = None  # share of frames shown, 0 = the first alone; None = video and image to 4D
    broken: str | None = None  # sample: a key of LINKS_ZEROED, or other_clip: another clip's frames are shown
    goes_on: bool = False  # train: from finished adapters instead of from scratch
    knob: bool = False  # another choice for what the paper leaves open
    own_target: bool = False  # its pointmaps are other latents, whose loss compares with no other run's


@dataclass(frozen=True)
class Claim:
    """`better` has the better `metric`; with a `factor`, it may even be so much worse and still be."""

    text: str
    metric: str
    better: str
    than: str
    factor: float = 1.0


@dataclass(frozen=True)
class Experiment:
    """A question, who claims what, and the runs that answer."""

    name: str
    question: str
    claim: str
    source: str
    runs: tuple[str, ...]
    metrics: tuple[str, ...]  # columns of its table; the first is drawn
    claims: tuple[Claim, ...]


def _guidance(scale: int) -> str:
    return f"sampler.guidance={{text: {scale}, image: {scale}, sparse: {scale}, video: {scale}}}"


def _masking(text: float, image: float, sparse: float, video: float) -> str:
    return f"masking={{text_prob: {text}, image_prob: {image}, sparse_prob: {sparse}, video_prob: {video}}}"


GENTLE = ("optim.lr=3.0e-4", "optim.warmup_steps=10")  # for adapters that are trained already


def _open(name: str, *overrides: str, seeds: int = 1, own_target: bool = False) -> Run:
    return Run(name, overrides, seeds, given=1, knob=True, own_target=own_target)


STANDARDISED, BENT = "dlc.standardise_xyz=true", "data.pointmap_power=0.5"

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
        Run("all_tasks", GENTLE, SEEDS, goes_on=True),
        Run("reconstruction_only", (*GENTLE, _masking(0, 0, 0, 1)), SEEDS, goes_on=True),
        Run("generation_only", (*GENTLE, _masking(0.3, 0.7, 0, 0)), SEEDS, goes_on=True),
        Run("synthetic_only", ("data.sources=[{path: data/toy_nano/train_synthetic}]",), FEW_SEEDS),
        *(Run(f"given_{share:g}", kind="sample", seeds=FEW_SEEDS, given=share) for share in (1, 0.5, 0.25, 0.1, 0)),
        *(
            Run(f"given_1_{broken}", kind="sample", seeds=seeds, given=1, broken=broken)
            for broken, seeds in (
                ("links_zeroed", FEW_SEEDS),
                ("other_clip", FEW_SEEDS),
                *((f"link_{block}_zeroed", 1) for block in BLOCKS_WITH_LINKS),
            )
        ),
        Run("shipped", kind="sample", seeds=FEW_SEEDS),
        Run("shipped_links_to_frames_zeroed", kind="sample", seeds=FEW_SEEDS, broken="links_to_frames_zeroed"),
        *(Run(f"guidance_{n}", (_guidance(n),), FEW_SEEDS, "sample") for n in (1, 2, 4, 6)),
        *(Run(f"steps_{n}", (f"sampler.steps={n}",), FEW_SEEDS, "sample") for n in (2, 5, 15)),
        Run("steps_50", ("sampler.steps=50",), 1, "sample"),
        _open("standardised", STANDARDISED, own_target=True),
        _open("bent", BENT, own_target=True),
        _open("standardised_and_bent", STANDARDISED, BENT, seeds=FEW_SEEDS, own_target=True),
        _open("shared_patch_embedding", "dlc.xyz_patch_embedding=false"),
        _open("z_offset", "data.z_offset=true", own_target=True),
        _open("far_limit_5", "data.far_limit=5", own_target=True),
        *(_open(f"rank_{n}", f"dlc.rank={n}") for n in (4, 64)),
        _open("lora_scale_2", "dlc.lora_scale=2"),
        *(_open(f"shift_{n}", f"flow.shift={n}") for n in (1, 5)),
        _open("separate_sigma", "flow.separate_sigma=true"),
        _open("xyz_weight_2", "flow.xyz_weight=2"),
        _open("link_lr_quarter", "optim.link_lr_width=64"),  # of 256 channels
        Run("vae_both", kind="vae", seeds=FEW_SEEDS),
        Run("vae_rgb_only", kind="vae_rgb", seeds=FEW_SEEDS),
    )
}

OPEN_KNOBS = tuple(name for name, run in RUNS.items() if run.knob)

ERROR, MOVING, EDGES, HIDDEN = "video.rel_error", "video.rel_error_moving", "video.rel_error_edges", "image.hidden_db"
XYZ, RGB = "val.xyz", "val.rgb"

EXPERIMENTS = (
    Experiment(
        "coupling",
        "How should frames and pointmaps share one transformer?",
        "Joining along channels degrades both, along the width aligns them weakly; Decoupled LoRA Control keeps frames "
        "and follows them.",
        "Fig. 2-3",
        (REFERENCE, "channel", "width", "references"),
        (ERROR, MOVING, EDGES, HIDDEN, "image.fd_vae", "video.given_db", XYZ, RGB),
        (
            Claim("frames are kept better than by channels", HIDDEN, REFERENCE, "channel"),
            Claim("frames are kept better than along the width", HIDDEN, REFERENCE, "width"),
            Claim("frames' loss is lower than by channels", RGB, REFERENCE, "channel"),
            Claim("frames' loss is lower than along the width", RGB, REFERENCE, "width"),
            Claim("pointmaps are better than by channels", ERROR, REFERENCE, "channel"),
            Claim("pointmaps are better than along the width", ERROR, REFERENCE, "width"),
            Claim("pointmaps' loss is lower than by channels", XYZ, REFERENCE, "channel"),
            Claim("pointmaps' loss is lower than along the width", XYZ, REFERENCE, "width"),
        ),
    ),
    Experiment(
        "links",
        "Are control links needed, how many, both ways, and where?",
        "A few links (5) let each branch steer the other, pixel by pixel.",
        "Eq. 9, sec. 3.2",
        (
            REFERENCE,
            "links_0",
            "links_1",
            "links_3",
            "links_one_way",
            "links_3_early",
            "links_3_late",
            "given_1",
            "given_1_links_zeroed",
            "given_1_other_clip",
            *(f"given_1_link_{block}_zeroed" for block in BLOCKS_WITH_LINKS),
            "shipped",
            "shipped_links_to_frames_zeroed",
            "references",
        ),
        (ERROR, MOVING, HIDDEN, XYZ, RGB),
        (
            Claim("without links geometry cannot follow the frames", ERROR, REFERENCE, "links_0"),
            Claim("without links the pointmaps' loss stays high", XYZ, REFERENCE, "links_0"),
            Claim("the shipped adapters need their links", ERROR, "given_1", "given_1_links_zeroed"),
            Claim("their geometry follows the clip that is shown", ERROR, "given_1", "given_1_other_clip"),
            Claim("pointmaps need the way to the frames, too", ERROR, "shipped", "shipped_links_to_frames_zeroed"),
            Claim("hidden frames need it", HIDDEN, "shipped", "shipped_links_to_frames_zeroed"),
            *(
                Claim(f"they need the link after block {block}", ERROR, "given_1", f"given_1_link_{block}_zeroed")
                for block in BLOCKS_WITH_LINKS
            ),
            Claim("five links are better than one", XYZ, REFERENCE, "links_1"),
            Claim("five links are better than three", XYZ, REFERENCE, "links_3"),
            Claim("both ways are better for pointmaps than one", XYZ, REFERENCE, "links_one_way"),
            Claim("both ways cost the frames less than 1 %", RGB, REFERENCE, "links_one_way", 1.01),
            Claim("three spread links are better than three early ones", XYZ, "links_3", "links_3_early"),
            Claim("three spread links are better than three late ones", XYZ, "links_3", "links_3_late"),
        ),
    ),
    Experiment(
        "unified",
        "What does one model for generation and reconstruction cost? (shipped adapters, trained on)",
        "One model does both at once, near models made for one.",
        "Tables 3-4",
        ("all_tasks", "reconstruction_only", "generation_only", "references"),
        (ERROR, MOVING, "image.rel_error", HIDDEN, "image.fd_vae"),
        (
            Claim("within 2 % of the reconstruction-only twin", ERROR, "all_tasks", "reconstruction_only", 1.02),
            Claim("hidden frames within 2 % of the generation-only twin", HIDDEN, "all_tasks", "generation_only", 1.02),
            Claim("reconstructs better than the generation-only twin", ERROR, "all_tasks", "generation_only"),
            Claim("generates better than the reconstruction-only twin", HIDDEN, "all_tasks", "reconstruction_only"),
        ),
    ),
    Experiment(
        "sparsity",
        "Does geometry get worse gracefully where fewer frames are given? (shipped adapters)",
        "Accuracy falls slowly from all frames to a tenth of them.",
        "Table 5",
        ("given_1", "given_0.5", "given_0.25", "given_0.1", "given_0", "references"),
        (ERROR, MOVING, "video.hidden_db"),
        (
            Claim("half of the frames: within 10 %", ERROR, "given_0.5", "given_1", 1.1),
            Claim("a tenth of them (first and last): within 10 %", ERROR, "given_0.1", "given_1", 1.1),
            Claim("all frames are better than the first alone", ERROR, "given_1", "given_0"),
        ),
    ),
    Experiment(
        "guidance",
        "How much guidance, how many sampling steps? (shipped adapters)",
        "Guidance 4 is better than 6 for reconstruction; 50 steps.",
        "Table 6, sec. 4.1",
        ("guidance_1", "guidance_2", "guidance_4", "guidance_6", "steps_2", "steps_5", "steps_15", "steps_50"),
        (ERROR, MOVING, HIDDEN, "image.fd_vae"),
        (
            Claim("guidance 4 is better than 6", ERROR, "guidance_4", "guidance_6"),
            Claim("guidance 1 (none) is better than 4", ERROR, "guidance_1", "guidance_4"),
            Claim("50 steps are better than 15", ERROR, "steps_50", "steps_15"),
            Claim("15 steps are better than 5", ERROR, "steps_15", "steps_5"),
            Claim("5 steps are better than 2", ERROR, "steps_5", "steps_2"),
        ),
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
    ),
    Experiment(
        "vae",
        "Must a video VAE have seen pointmaps to carry them?",
        "Wan's VAE, made for RGB, encodes pointmaps as well.",
        "sec. 3.1",
        ("vae_both", "vae_rgb_only", "references"),
        ("vae.rel_error", "vae.rel_error_moving", "vae.given_db"),
        (
            Claim("a VAE that saw frames alone is within 10 %", "vae.rel_error", "vae_rgb_only", "vae_both", 1.1),
            Claim("it keeps frames better", "vae.given_db", "vae_rgb_only", "vae_both"),
        ),
    ),
    Experiment(
        "open",
        "What the paper leaves open: does another choice do better than ours?",
        "None; each line says whether the other choice is better.",
        "paper.md sec. 8",
        (REFERENCE, *OPEN_KNOBS),
        (ERROR, MOVING, XYZ, RGB),
        (
            *(Claim(f"{name} is better", ERROR, name, REFERENCE) for name in OPEN_KNOBS),
            *(Claim(f"{name} learns faster", XYZ, name, REFERENCE) for name in OPEN_KNOBS if not RUNS[name].own_target),
        ),
    ),
)
