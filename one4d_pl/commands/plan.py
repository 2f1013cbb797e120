"""one4d plan --config ... --gpus 64 --gpu H200: what a run will need and take, before anything is loaded.

Parameters, memory per GPU by part, operations and time per step, hours and GPU-hours to the end, legal global batches,
which ways of training and of sampling fit which GPUs. With --fit, the fastest way of training that fits, as overrides
to paste. The base's own config.json where it is there, else the released Wan 2.1 models'. Sizes, operations and copies
are counted in closed form (one4d_pl/costs); HFU is the caller's guess, the allowance ours.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from one4d_pl.commands.command import Command
from one4d_pl.config import CHECKPOINTING, Config, ConfigError, load_config
from one4d_pl.costs.flops import BatchShape, Flops, TransformerShape, count_tokens, peak_flops, training_flops
from one4d_pl.costs.memory import (
    GPU_GIB,
    Layout,
    Memory,
    batch_of,
    count_parameters,
    layout_of,
    step_memory,
)
from one4d_pl.costs.sampling import MODES, sampling_memory, scene_seconds
from one4d_pl.costs.transfers import pass_bytes, step_seconds
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
    sampler_steps: int
    note: str  # why batch and steps are not the config's; empty if they are

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.layout.world * self.batch.clips)

    def flops(self, checkpointing: str) -> Flops:
        """Count the operations of one GPU in one optimiser step."""
        return training_flops(self.shape, self.batch, checkpointing, flash=True) * self.accumulation

    @property
    def speed(self) -> float:
        """Return the operations per second at the stated share of the GPU's peak."""
        peak = peak_flops(f"NVIDIA {self.gpu}", "bf16-mixed")
        assert peak is not None
        return self.hfu * peak

    def seconds(self, layout: Layout) -> float:
        """Estimate the time of a step (s)."""
        return step_seconds(self.shape, self.batch, layout, self.accumulation, self.speed)

    def memory(self, layout: Layout) -> Memory:
        """Compute the memory of one process."""
        return step_memory(self.shape, self.batch, layout)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="yaml; later files win")
    parser.add_argument("--gpus", type=int, metavar="N", help="default: the config's num_nodes x devices")
    parser.add_argument("--gpu", choices=GPU_GIB, default="H100", help="default: H100")
    parser.add_argument("--fit", action="store_true", help="plan the fastest way that fits the GPU, not the config's")
    parser.add_argument("--host", type=float, metavar="GIB", help="host memory that --fit may use for each process")
    parser.add_argument("--hfu", type=float, default=0.5, help="share of the GPU's peak that is reached (default 0.5)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _run(args: argparse.Namespace) -> None:
    if not 0 < args.hfu <= 1:
        raise ConfigError(f"--hfu: need a share in (0, 1], got {args.hfu}")
    config = load_config(args.config, args.overrides)
    gpus = config.train.world_size if args.gpus is None else args.gpus
    if gpus < 1:
        raise ConfigError(f"--gpus: need at least one, got {gpus}")
    run = plan(config, gpus, args.gpu, args.hfu)
    if not args.fit:
        print(plan_text(run))
        return
    run = replace(run, layout=fastest_fit(run, args.host))
    print(f"{plan_text(run)}\n\npaste       {overrides_text(run.layout)}")


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
        sampler_steps=config.sampler.steps,
        note=note,
    )


def plan_text(run: Run) -> str:
    """Format the plan as text."""
    return "\n".join([*_sizes(run), "", *_time(run), "", *_memory(run), "", *_ways(run), "", *_scenes(run)])


def all_ways(run: Run) -> list[Layout]:
    """List every way to train that the run's GPUs have: strategy, recomputation, what lies on the host, int8."""
    found = []
    for stage in range(4):
        for checkpointing in CHECKPOINTING:
            for offload in (False, True) if stage else (False,):
                # stage 3 shares out the blocks itself; without recomputation autograd would keep visiting blocks
                for quantised in (False, True) if stage < 3 else (False,):
                    for visiting in (False, True) if stage < 3 and checkpointing != "none" else (False,):
                        found.append(
                            replace(
                                run.layout, zero_stage=stage, checkpointing=checkpointing, offload=offload,
                                quantised=quantised, visiting=visiting,
                            )
                        )  # fmt: skip
    return found


def best_ways(run: Run) -> list[Layout]:
    """List the ways that no other beats at once in GPU memory, host memory, time and precision of the base."""
    costs: dict[tuple[float, ...], Layout] = {}
    for way in all_ways(run):  # of equal ones the first, which has the plainer strategy
        memory = run.memory(way)
        costs.setdefault((memory.total, memory.host, run.seconds(way), way.quantised), way)
    beaten = {
        cost for cost in costs for other in costs
        if other != cost and all(theirs <= 1.01 * ours for theirs, ours in zip(other, cost, strict=True))
        and (other < cost or any(theirs < 0.99 * ours for theirs, ours in zip(other, cost, strict=True)))
    }  # fmt: skip
    return [
        way for cost, way in sorted(costs.items(), key=lambda item: (item[0][2], -item[0][0])) if cost not in beaten
    ]


def fastest_fit(run: Run, host_gib: float | None = None) -> Layout:
    """Return the fastest way of training that fits the run's GPU and, where given, the host memory.

    Of ways that are equally fast, one that does not round the base, and of those the one that takes
    the least host memory. ConfigError where none fits.
    """
    ways = [way for way in best_ways(run) if host_gib is None or run.memory(way).host <= host_gib * GIB]
    fitting = [way for way in ways if run.memory(way).fits(GPU_GIB[run.gpu] * GIB)]
    if not fitting:
        smallest = min((run.memory(way) for way in ways), key=lambda memory: memory.total, default=None)
        least = "even the least host memory is more"
        if smallest is not None:
            least = f"the smallest needs {smallest.total / GIB:.1f} with {smallest.host / GIB:.0f} on the host"
        raise ConfigError(
            f"--fit: no way of training fits an {run.gpu} ({GPU_GIB[run.gpu]} GiB"
            f"{'' if host_gib is None else f', {host_gib:g} GiB on the host'}); {least}; "
            "make data.num_frames, data.height and data.width smaller"
        )
    return min(fitting, key=lambda way: (float(f"{run.seconds(way):.2g}"), way.quantised, run.memory(way).host))


def overrides_text(layout: Layout) -> str:
    """Write a way of training as overrides of `fit`."""
    strategy = "deepspeed" if layout.zero_stage else "ddp" if layout.world > 1 else "single"
    words = [f"train.strategy={strategy}"]
    if layout.zero_stage:
        words += [f"train.zero_stage={layout.zero_stage}", f"train.offload={_yaml(layout.offload)}"]
    words.append(f"train.activation_checkpointing={layout.checkpointing}")
    words.append(f"base.quantisation={'int8' if layout.quantised else 'none'}")
    words.append(f"base.offload={_yaml(layout.visiting)}")
    return " ".join(words)


def _sizes(run: Run) -> list[str]:
    n, shape, batch = count_parameters(run.shape), run.shape, run.batch
    t, h, w = batch.latent_grid
    control = n.links + n.patch_embedding
    return [
        f"base        {run.base}",
        f"            {shape.num_layers} blocks of width {shape.width}, {n.frozen / 1e9:.2f}e9 frozen parameters",
        f"adapter     {n.lora / MEGA:.1f} LoRA / {control / MEGA:.1f} control / {n.trainable / MEGA:.1f} (x 2^20)",
        f"clip        latents {t}x{h}x{w}, {count_tokens(shape, batch)} tokens per branch; "
        f"{batch.text_tokens} tokens of text, {batch.image_tokens} of the image",
    ]


def _time(run: Run) -> list[str]:
    layout = run.layout
    flops, seconds = run.flops(layout.checkpointing), run.seconds(layout)
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
    memory = run.memory(run.layout)
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


def _ways(run: Run) -> list[str]:
    lines = [
        "ways        GiB per GPU where the encoders visit it in every step, and without (encoded shards); host: GiB of",
        "            each process; GB: copies of a pass; fits: GPUs that hold the first, in brackets those that hold",
        "            only the second. Left out: what another way beats in memory, time and precision. * the config's",
        f"  {'ZeRO':<6}{'recompute':<11}{'AdamW':<7}{'base':<14}"
        f"{'GiB':>7}{'without':>9}{'host':>7}{'GB':>6}{'s/step':>10}  fits",
    ]
    ways = best_ways(run)
    for way in ways if run.layout in ways else [run.layout, *ways]:
        both = [run.memory(each) for each in (way, way.without_encoders())]
        base = ("int8" if way.quantised else "whole") + (", visits" if way.visiting else "")
        lines.append(
            f"{'*' if way == run.layout else ' '} {way.zero_stage:<6}{way.checkpointing:<11}"
            f"{'host' if way.offload else 'GPU':<7}{base:<14}{both[0].total / GIB:7.1f}{both[1].total / GIB:9.1f}"
            f"{both[0].host / GIB:7.1f}{pass_bytes(run.shape, run.batch, way) / 1e9:6.0f}"
            f"{run.seconds(way):10.3g}  {_fits(*both)}"
        )
    return lines


def _scenes(run: Run) -> list[str]:
    """Plan `one4d generate --memory` for scenes of the config's size."""
    batch, steps = replace(run.batch, clips=1), run.sampler_steps
    lines = [
        f"scenes      of the config's size in {steps} steps with guidance; `one4d generate` takes the first that fits"
    ]
    for mode in MODES:
        memory = sampling_memory(run.shape, batch, run.layout, mode)
        seconds = scene_seconds(run.shape, batch, run.layout, mode, steps, run.speed)
        lines.append(
            f"  {mode.title:<68}{memory.total / GIB:6.1f} GiB{memory.host / GIB:6.1f} on the host{seconds:7.0f} s  "
            f"{_fits(memory)}"
        )
    return lines


def _fits(whole: Memory, encoded: Memory | None = None) -> str:
    names = [gpu for gpu, size in GPU_GIB.items() if whole.fits(size * GIB)]
    more = [gpu for gpu, size in GPU_GIB.items() if gpu not in names and encoded and encoded.fits(size * GIB)]
    return ", ".join([*names, *(f"({gpu})" for gpu in more)]) or "none"


def _yaml(switch: bool) -> str:
    return "true" if switch else "false"


main = Command("one4d plan", __doc__, _add_arguments, _run)
