"""one4d plan --config ... --gpus 64 --gpu H200: what a run will need and take, before anything is loaded.

Parameters, memory per GPU by part, operations and time per step, hours and GPU-hours to the end, legal global batches,
and which strategies fit which GPUs. The base's own config.json where it is there, else the released Wan 2.1 models'.
Sizes and operations are counted in closed form (one4d_pl/costs); HFU is the caller's guess, the allowance ours.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from one4d_pl.commands.command import Command
from one4d_pl.config import Config, ConfigError, load_config
from one4d_pl.costs.flops import BatchShape, Flops, TransformerShape, peak_flops, training_flops
from one4d_pl.costs.memory import (
    GPU_GIB,
    Layout,
    Memory,
    batch_of,
    count_parameters,
    layout_of,
    step_memory,
)
from one4d_pl.models.base_files import IMAGE_TOKENS, encoder_sizes, sizes_of

GIB, MEGA = 2**30, 2**20


@dataclass(frozen=True)
class Run:
    """A config on a number of GPUs of one kind."""

    base: str  # where the sizes come from
    shape: TransformerShape
    batch: BatchShape
    layout: Layout
    gpu: str
    hfu: float
    global_batch: int
    steps: int
    note: str  # why batch and steps are not the config's; empty if they are

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.layout.world * self.batch.clips)

    def flops(self, checkpointing: str) -> Flops:
        """Count the operations of one GPU in one optimiser step."""
        return training_flops(self.shape, self.batch, checkpointing, flash=True) * self.accumulation

    def seconds(self, checkpointing: str) -> float:
        """Estimate the time of a step (s) at the stated share of the GPU's peak."""
        peak = peak_flops(f"NVIDIA {self.gpu}", "bf16-mixed")
        assert peak is not None
        return self.flops(checkpointing).hardware / (self.hfu * peak)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="yaml; later files win")
    parser.add_argument("--gpus", type=int, metavar="N", help="default: the config's num_nodes x devices")
    parser.add_argument("--gpu", choices=GPU_GIB, default="H100", help="default: H100")
    parser.add_argument("--hfu", type=float, default=0.5, help="share of the GPU's peak that is reached (default 0.5)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _run(args: argparse.Namespace) -> None:
    if not 0 < args.hfu <= 1:
        raise ConfigError(f"--hfu: need a share in (0, 1], got {args.hfu}")
    config = load_config(args.config, args.overrides)
    gpus = config.train.world_size if args.gpus is None else args.gpus
    if gpus < 1:
        raise ConfigError(f"--gpus: need at least one, got {gpus}")
    print(plan_text(plan(config, gpus, args.gpu, args.hfu)))


def plan(config: Config, gpus: int, gpu: str, hfu: float) -> Run:
    """Plan the run of a config on so many GPUs.

    Where they cannot make its global batch, the next larger one that they can make is planned.
    """
    folder, settings, base = sizes_of(config.base.path)
    train, shape = config.train, TransformerShape.of(settings, config.dlc)
    per_pass = gpus * train.micro_batch_size
    global_batch = -(-train.global_batch_size // per_pass) * per_pass
    steps = -(-train.max_steps * train.global_batch_size // global_batch)
    note = ""
    if global_batch != train.global_batch_size:
        note = (
            f"train.global_batch_size {train.global_batch_size} cannot be made by {gpus} GPUs x "
            f"{train.micro_batch_size}: planned with {global_batch} and {steps} steps, as many clips"
        )
    return Run(
        base=base,
        shape=shape,
        batch=batch_of(config, IMAGE_TOKENS if shape.image_dim is not None else 0),
        layout=replace(layout_of(config, *encoder_sizes(folder)), world=gpus),
        gpu=gpu,
        hfu=hfu,
        global_batch=global_batch,
        steps=steps,
        note=note,
    )


def plan_text(run: Run) -> str:
    """Format the plan as text."""
    return "\n".join([*_sizes(run), "", *_time(run), "", *_memory(run), "", *_strategies(run)])


def _sizes(run: Run) -> list[str]:
    n, shape, batch = count_parameters(run.shape), run.shape, run.batch
    t, h, w = batch.latent_grid
    tokens = t * h * w // (shape.patch[0] * shape.patch[1] * shape.patch[2])
    control = n.links + n.patch_embedding
    return [
        f"base        {run.base}",
        f"            {shape.num_layers} blocks of width {shape.width}, {n.frozen / 1e9:.2f}e9 frozen parameters",
        f"adapter     {n.lora / MEGA:.1f} LoRA / {control / MEGA:.1f} control / {n.trainable / MEGA:.1f} (x 2^20)",
        f"clip        latents {t}x{h}x{w}, {tokens} tokens per branch; {batch.text_tokens} tokens of text, "
        f"{batch.image_tokens} of the image",
    ]


def _time(run: Run) -> list[str]:
    layout = run.layout
    flops, seconds = run.flops(layout.checkpointing), run.seconds(layout.checkpointing)
    hours = seconds * run.steps / 3600
    per_pass = layout.world * run.batch.clips
    return [
        *([f"note        {run.note}"] if run.note else []),
        f"batch       {run.global_batch} = {layout.world} GPUs x {run.batch.clips} x accumulation {run.accumulation}; "
        f"legal: {', '.join(str(per_pass * i) for i in range(1, 5))}, ... (multiples of {per_pass})",
        f"step        {flops.hardware / 1e12:.4g} TFLOP per GPU ({flops.forward / 1e12:.4g} forward, "
        f"{flops.backward / 1e12:.4g} backward, {flops.recompute / 1e12:.4g} recomputed)",
        f"            {seconds:.3g} s at {run.hfu:.0%} of an {run.gpu}'s peak, without encoders and communication",
        f"run         {run.steps} steps: {hours:.1f} h, {hours * layout.world:.0f} GPU-hours",
    ]


def _memory(run: Run) -> list[str]:
    memory = step_memory(run.shape, run.batch, run.layout)
    verdict = "fits" if memory.fits(GPU_GIB[run.gpu] * GIB) else "DOES NOT FIT"
    lines = [f"memory      GiB per GPU, {_layout_text(run.layout)}"]
    lines += [f"  {name:<12}{value / GIB:8.2f}" for name, value in memory.parts() if value]
    lines.append(f"  {'total':<12}{memory.total / GIB:8.2f}   {verdict} {run.gpu} ({GPU_GIB[run.gpu]} GiB)")
    if memory.host:
        lines.append(f"  {'host':<12}{memory.host / GIB:8.2f}   of each process, in the node's own memory")
    return lines


def _layout_text(layout: Layout) -> str:
    stage = (
        f"ZeRO-{layout.zero_stage}"
        if layout.zero_stage
        else "ddp, every process whole"
        if layout.world > 1
        else "one process"
    )
    recompute = {
        "none": "every activation kept",
        "full": "blocks recomputed",
        "selective": "blocks recomputed but for self-attention",
        "offload": "blocks recomputed from inputs that wait on the host",
    }[layout.checkpointing]
    words = [stage, recompute]
    words += ["AdamW on the host"] if layout.offload else []
    words += ["one byte per frozen weight"] if layout.quantised else []
    words += ["blocks visit from the host"] if layout.visiting else []
    return ", ".join(words)


def _strategies(run: Run) -> list[str]:
    lines = [
        "every way   GiB per GPU where the encoders visit it in every step, and without (encoded shards);",
        "            fits: the GPUs that hold the first, in brackets those that hold the second alone",
        f"  {'ZeRO':<6}{'recompute':<11}{'offload':<9}{'GiB':>7}{'without':>9}{'s/step':>10}  fits",
    ]
    for stage in range(4):
        for checkpointing in ("full", "selective", "none"):
            for offload in (False, True) if stage else (False,):
                layout = replace(run.layout, zero_stage=stage, checkpointing=checkpointing, offload=offload)
                both = [step_memory(run.shape, run.batch, way) for way in (layout, layout.without_encoders())]
                mark = "*" if layout == run.layout else " "
                lines.append(
                    f"{mark} {stage:<6}{checkpointing:<11}{_yes_no(offload):<9}{both[0].total / GIB:7.1f}"
                    f"{both[1].total / GIB:9.1f}{run.seconds(checkpointing):10.3g}  {_fits(*both)}"
                )
    return lines


def _fits(whole: Memory, encoded: Memory) -> str:
    names = [gpu for gpu, size in GPU_GIB.items() if whole.fits(size * GIB)]
    more = [gpu for gpu, size in GPU_GIB.items() if gpu not in names and encoded.fits(size * GIB)]
    return ", ".join([*names, *(f"({gpu})" for gpu in more)]) or "none"


def _yes_no(switch: bool) -> str:
    return "yes" if switch else "no"


main = Command("one4d plan", __doc__, _add_arguments, _run)
