"""python -m experiments.bench_gpu: what a training step takes on the device at hand, weights and data at random.

Needs torch, diffusers and this package, nothing else. The full step of Decoupled LoRA Control: stacked dual sample,
LoRAs, links, activation checkpointing, loss, backward, clipping, AdamW. Prints a table and how it was measured.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from experiments.gpu_ceiling import measure_ceiling, seconds
from one4d_pl.commands.command import Command
from one4d_pl.config import ATTENTION, CHECKPOINTING, ConfigError, DLCConfig, OptimConfig
from one4d_pl.costs.flops import BatchShape, TransformerShape, peak_flops, training_flops
from one4d_pl.costs.memory import Layout, Memory, step_memory
from one4d_pl.diffusion.flow_matching import interpolate, mse_per_sample
from one4d_pl.files import check_folder, write_json
from one4d_pl.models.base_files import IMAGE_TOKENS, RELEASED
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.training.optim import build_optimizer

GIB = 2**30
TERA = 1e12
# standard deviation of all random weights: a product of zeros draws less power and runs faster
WEIGHT_STD = 0.02
CLIP = BatchShape(clips=1, latent_grid=(21, 44, 78), text_tokens=512, image_tokens=IMAGE_TOKENS)  # 81 x 352 x 624
TINY_CLIP = BatchShape(clips=1, latent_grid=(3, 8, 12), text_tokens=512, image_tokens=17)
TINY = {
    **RELEASED["14B"], "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 96,
    "text_dim": 24, "image_dim": 20, "freq_dim": 32, "added_kv_proj_dim": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One way to train one model."""

    model: str
    checkpointing: str
    attention: str
    compile: bool
    settings: dict[str, object]  # of the transformer, by diffusers' names
    dlc: DLCConfig
    batch: BatchShape

    @property
    def name(self) -> str:
        return ", ".join([self.model, self.checkpointing, self.attention, *(["compiled"] if self.compile else [])])

    @property
    def shape(self) -> TransformerShape:
        return TransformerShape.of(self.settings, self.dlc)

    @property
    def memory(self) -> Memory:
        """Return the planner's estimate: one process, no encoders."""
        return step_memory(self.shape, self.batch, Layout(1, 0, self.checkpointing, False, True, True, 0.0, 0.0, 0))


@dataclass(frozen=True)
class Measured:
    """One row of the table; None = not known on this device."""

    seconds: float  # of a dual sample, median over the steps
    slowest: float
    tflops: float  # of the model's operations, per second
    mfu: float | None
    hfu: float | None
    hfu_of_ceiling: float  # executed operations over the best matrix product measured here
    peak_gib: float | None  # of tensors, by the allocator
    reserved_gib: float | None  # that the allocator took from the device
    planned_gib: float  # of tensors, by the planner
    loss: float


def _run(args: argparse.Namespace) -> int:
    """Measure and print; return the exit code: 1 where a case did not fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        raise ConfigError("no CUDA device; --tiny runs the same on a CPU")
    if args.out is not None:
        check_folder(Path(args.out).parent, "--out")
    ceiling = measure_ceiling(device, args.tiny)
    _print_lines(ceiling_table(ceiling))
    best = max(speed for name, speed in ceiling.items() if not name.startswith("attention"))
    rows: dict[str, Measured | str] = {}
    for case in cases(args):
        gc.collect()  # modules of the last case and their hooks refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            rows[case.name] = measure(case, device, args.steps, args.warmup, best, args.profile)
        except torch.OutOfMemoryError:
            rows[case.name] = _out_of_memory(case, device)
    _print_lines([*table(rows), "", *method(args, device)])
    if args.out is not None:
        _write(Path(args.out), {"device": device_name(device), "torch": torch.__version__, "ceiling": ceiling}, rows)
    return 1 if any(isinstance(row, str) for row in rows.values()) else 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=RELEASED, default=["14B", "1.3B"], help="default: both")
    parser.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTING, default=["full"], help="default: full")
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=["native"], help="default: native")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRAs (default 64)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps (default 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--profile", action="store_true", help="print where the time of one more step goes")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: the whole command in seconds on a CPU")
    parser.add_argument("--out", metavar="FILE", help="the same as json")


def cases(args: argparse.Namespace) -> list[Case]:
    """List the cases that the command line asks for."""
    models = {"tiny": TINY} if args.tiny else {name: RELEASED[name] for name in args.models}
    dlc, batch = DLCConfig(rank=args.rank, num_links=1 if args.tiny else 5), TINY_CLIP if args.tiny else CLIP
    return [
        Case(model, checkpointing, attention, args.compile, settings, dlc, batch)
        for model, settings in models.items()
        for checkpointing in args.checkpointing
        for attention in args.attention
    ]


def random_base(settings: dict[str, object], device: torch.device) -> WanTransformer3DModel:
    """Make a frozen Wan of random weights on the device.

    They are bfloat16, norms, time embedder and modulation float32.
    """
    with torch.device("meta"):
        base = WanTransformer3DModel.from_config(settings)
    # computed by the constructor, so on the meta device they have no values
    base.rope = type(base.rope)(base.config.attention_head_dim, base.config.patch_size, 1024)
    float32 = base._keep_in_fp32_modules or ()
    for name, empty in list(base.named_parameters()):
        dtype = torch.float32 if any(part in name.split(".") for part in float32) else torch.bfloat16
        tensor = torch.empty(empty.shape, dtype=dtype, device=device)
        one = "norm" in name and name.endswith("weight")
        owner, _, leaf = name.rpartition(".")
        values = nn.init.ones_(tensor) if one else nn.init.normal_(tensor, std=WEIGHT_STD)
        setattr(base.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    return base.to(device)


def measure(case: Case, device: torch.device, steps: int, warmup: int, ceiling: float, profile: bool) -> Measured:
    """Time whole training steps of one case; OutOfMemoryError where it does not fit.

    Args:
        case: the model and how it is trained.
        device: to run on.
        steps: how many are measured.
        warmup: steps before them that are not measured.
        ceiling: speed of the fastest matrix product on this device, TFLOP/s.
        profile: print the operations of one more step by time.
    """
    torch.manual_seed(0)
    transformer = One4DTransformer(random_base(case.settings, device), case.dlc, seed=0)
    for _, parameter in transformer.trainable_parameters():
        nn.init.normal_(parameter, std=WEIGHT_STD / 10)
    transformer.set_attention(case.attention)
    transformer.set_activation_checkpointing(case.checkpointing)
    if case.compile:
        transformer.compile_blocks()
    optimizer = build_optimizer(transformer, OptimConfig())
    inputs = random_inputs(case, device)

    losses = []

    def step() -> None:
        losses.append(training_step(transformer, optimizer, inputs))

    for _ in range(warmup):
        step()
    times = [seconds(step, device) for _ in range(steps)]
    peak_gib = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    reserved_gib = torch.cuda.max_memory_reserved() / GIB if device.type == "cuda" else None
    if profile:
        _profile(step, device)
    flops = training_flops(case.shape, case.batch, case.checkpointing, flash=True)
    peak = peak_flops(device_name(device), "bf16-mixed")
    median = statistics.median(times)
    return Measured(
        seconds=median,
        slowest=max(times),
        tflops=flops.model / median / TERA,
        mfu=None if peak is None else flops.model / median / peak,
        hfu=None if peak is None else flops.hardware / median / peak,
        hfu_of_ceiling=flops.hardware / median / TERA / ceiling,
        peak_gib=peak_gib,
        reserved_gib=reserved_gib,
        planned_gib=case.memory.tensors / GIB,
        loss=float(losses[-1]),
    )


@dataclass(frozen=True)
class Inputs:
    """The inputs that the encoders would give."""

    latents: Tensor  # [2B, C, t, h, w]
    noise: Tensor  # [2B, C, t, h, w]
    condition: Tensor  # [B, 4 + C, t, h, w]
    sigma: Tensor  # [2B]
    prompt_embeds: Tensor  # [B, L, D]
    image_embeds: Tensor  # [B, N, D]


def random_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw random inputs in float32, as the encoders give them."""
    clips, shape, grid = case.batch.clips, case.shape, case.batch.latent_grid
    assert shape.image_dim is not None

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device)

    return Inputs(
        latents=random(2 * clips, shape.out_channels, *grid),
        noise=random(2 * clips, shape.out_channels, *grid),
        condition=random(clips, shape.in_channels - shape.out_channels, *grid),
        sigma=torch.full((2 * clips,), 0.7, device=device),
        prompt_embeds=random(clips, case.batch.text_tokens, shape.text_dim),
        image_embeds=random(clips, case.batch.image_tokens, shape.image_dim),
    )


def training_step(transformer: One4DTransformer, optimizer: torch.optim.Optimizer, inputs: Inputs) -> Tensor:
    """Do a step as training/module.py does from cached encodings; return the loss."""
    with torch.autocast(inputs.latents.device.type, torch.bfloat16):
        noisy_latents, velocity = interpolate(inputs.latents, inputs.noise, inputs.sigma)
        velocity_pred = transformer(
            noisy_latents, inputs.condition, inputs.sigma, inputs.prompt_embeds, inputs.image_embeds
        )
        rgb, xyz = mse_per_sample(velocity_pred, velocity)
        loss = rgb.mean() + xyz.mean()
    loss.backward()
    nn.utils.clip_grad_norm_([parameter for _, parameter in transformer.trainable_parameters()], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _profile(step: Callable[[], object], device: torch.device) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    _print_lines([profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70)])


def ceiling_table(ceiling: dict[str, float]) -> list[str]:
    """Format the speeds of products as markdown."""
    return [
        "| bf16 product | TFLOP/s |",
        "|---|---:|",
        *(f"| {name} | {speed:.4g} |" for name, speed in ceiling.items()),
        "",
    ]


def table(rows: dict[str, Measured | str]) -> list[str]:
    """Format the measured cases as markdown."""
    lines = [
        "| case | s/sample | slowest | TFLOP/s | MFU | HFU | of ceiling | peak GiB | reserved | planned |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        if isinstance(row, str):
            lines.append(f"| {name} | {row} |" + " |" * 8)
            continue
        cells = [f"{row.seconds:.3g}", f"{row.slowest:.3g}", f"{row.tflops:.4g}", _share(row.mfu), _share(row.hfu)]
        cells += [_share(row.hfu_of_ceiling), _gib(row.peak_gib), _gib(row.reserved_gib), _gib(row.planned_gib)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def method(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Describe how the numbers were measured."""
    size = "toy size" if args.tiny else "81 x 352 x 624 pixels (latents 21 x 44 x 78), 512 text and 257 image tokens"
    return [
        f"{device_name(device)}, torch {torch.__version__}; one dual sample (rgb and xyz stacked), {size}; random "
        f"bf16 weights, LoRA rank {args.rank} and links float32, bf16 autocast, no encoders, one process.",
        f"s/sample: wall clock of forward, loss, backward, clipping and AdamW, median of {args.steps} steps after "
        f"{args.warmup}. MFU, HFU: operations by one4d_pl/costs/flops.py over the data sheet's dense bf16 peak; of "
        "ceiling: HFU's operations over the fastest product above (median of five runs of ten). Peak: most bytes of "
        "tensors; planned: the same by one4d_pl/costs/memory.py.",
    ]


def _out_of_memory(case: Case, device: torch.device) -> str:
    has = f"{torch.cuda.mem_get_info()[1] / GIB:.1f} GiB" if device.type == "cuda" else "less"
    return f"out of memory: {case.memory.total / GIB:.1f} GiB planned, the device has {has}"


def _write(path: Path, about: dict[str, object], rows: dict[str, Measured | str]) -> None:
    found = {name: row if isinstance(row, str) else asdict(row) for name, row in rows.items()}
    write_json(path, {**about, "cases": found})


def device_name(device: torch.device) -> str:
    """Return the GPU's name by its driver, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _print_lines(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)


main = Command("python -m experiments.bench_gpu", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
