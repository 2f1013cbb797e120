"""Rehearsals in a process of their own, for torch must not be imported before its device is: what each saw, as json.

python -m tests.rehearsal.cases FILE
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from one4d_pl.config import CHECKPOINTING, Config, load_config
from one4d_pl.rehearsal.fake_cuda import load_device

REPO = Path(__file__).parents[2]
PAPER = [str(REPO / f"configs/{name}.yaml") for name in ("dlc", "scale/wan_14b", "data/one4d_mix")]
BLOCKS = 2
SMALL_CLIP = ("data.num_frames=9", "data.height=64", "data.width=96")
cases: dict[str, Callable[[], object]] = {}


def case(function: Callable[[], object]) -> Callable[[], object]:
    cases[function.__name__] = function
    return function


def paper(*overrides: str) -> Config:
    return load_config(PAPER, ["dlc.num_links=1", *overrides])


def step(checkpointing: str, *overrides: str, blocks: int = BLOCKS) -> dict[str, object]:
    """One step of the paper's own clip from cached encodings: the transformer alone."""
    from one4d_pl.rehearsal import run

    config = paper("data.cache_latents=true", f"train.activation_checkpointing={checkpointing}", *overrides)
    with patch.object(run, "sample", lambda *args: None):
        seen = run.rehearse(config, blocks)
    planned = seen.planned
    fixed = planned.weights + planned.gradients + planned.optimizer
    return {
        "peak": seen.step_peak,
        "planned": planned.tensors,
        # frames and pointmap, float32: the planner leaves them out, and they lie on the GPU through the step
        "pixels": 4 * 2 * 3 * config.data.num_frames * config.data.height * config.data.width,
        "fixed": fixed,
        "traffic": seen.traffic,
        "elementwise": seen.elementwise,
        "wide": sorted({kind for kind, _ in seen.phases["forward"].wide}),
        "waits": {name: phase.waits.total() for name, phase in seen.phases.items()},
        "tensors": seen.tensors,
    }


cases |= {f"step_{mode}": partial(step, mode) for mode in CHECKPOINTING}


@case
def step_offload() -> object:
    return step("offload")


@case
def step_visiting() -> object:
    return step("offload", "base.quantisation=int8", "base.offload=true", blocks=3)  # of which two are on the GPU


def small(
    *overrides: str, at_end: object = None, callbacks: Callable[[Config], list] = lambda config: [], **options: object
):
    """A run of a small clip, and what `at_end` does with the trained module; returns the watch."""
    from one4d_pl.rehearsal import run
    from one4d_pl.rehearsal.skeleton import write_skeleton

    with TemporaryDirectory() as folder:
        write_skeleton(Path(folder) / "base", "weights/Wan2.1-Fun-V1.1-14B-InP", BLOCKS)
        config = run.one_process(paper(*SMALL_CLIP, *overrides), Path(folder), BLOCKS)
        with run.rehearsing(config) as watch:
            run.fit(config, *callbacks(config), run.Watching(watch, at_end, **options))
        return watch


def note_samples(calls: list[int], transformer: object, inputs: tuple) -> None:
    calls.append(len(inputs[0]))


@case
def sampling() -> object:
    """Guidance in one call and in two, VAE whole and in tiles; the encoders visit the device."""
    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.rehearsal.run import fake_sample
    from one4d_pl.types import collate

    found = {}

    def sample(trainer, module, watch) -> None:
        batch = collate([fake_sample(module.config, given=[0])]).to(module.device)
        noise = module.draw_noise(batch, "sampling noise")
        sampler = replace(module.config.sampler, steps=2)
        for name, frugal, tiled in (("stacked", False, False), ("two calls", True, False), ("tiled", False, True)):
            pipeline = One4DPipeline(module.transformer, module.encoders, sampler, 5.0, "ugly", bfloat16=True)
            pipeline.frugal = frugal
            if tiled:
                module.encoders.vae.enable_tiling(48, 48, 32, 32)
            calls: list[int] = []
            handle = module.transformer.register_forward_pre_hook(partial(note_samples, calls))
            watch.begin(name)
            scene = pipeline.sample(["a cube"], batch.frames, batch.frame_mask, noise)
            handle.remove()
            found[name] = {
                "calls": calls,
                "devices": sorted({str(t.device) for t in (scene.frames, scene.pointmap)}),
                "shape": list(scene.pointmap.shape),
                "peak": watch.phases[name].peak,
                "encoders": sorted({str(p.device) for p in module.encoders.parameters()}),
            }

    small(at_end=sample, largest=False)
    return found


@case
def scene() -> object:
    """One scene of the paper's size as a card of 16 GB makes it: an int8 base that visits block by block.

    Without the VAE, which has half the transformer's peak and takes a minute to rehearse.
    """
    import torch

    from one4d_pl.costs.flops import TransformerShape
    from one4d_pl.costs.memory import batch_of, layout_of
    from one4d_pl.costs.sampling import MODES, sampling_memory
    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.models.base_files import encoder_sizes, image_tokens, transformer_config
    from one4d_pl.rehearsal import run
    from one4d_pl.rehearsal.skeleton import write_skeleton

    blocks, mode = 3, MODES[-1]
    with TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        write_skeleton(base, "weights/Wan2.1-Fun-V1.1-14B-InP", blocks)
        config = run.one_process(paper("sampler.steps=1"), Path(folder), blocks)
        device = torch.device("cuda", 0)
        with run.rehearsing(config) as watch, torch.no_grad():
            pipeline = One4DPipeline.open(config, None, device, mode)
            frames = torch.zeros(1, 3, 81, 352, 624).to(device)
            given = torch.ones(1, 81, dtype=torch.bool).to(device)
            noise = torch.randn(2, 16, 21, 44, 78).to(device)
            pipeline.transformer.register_forward_pre_hook(lambda *_: watch.begin("transformer"))
            pipeline.encoders.encode = lambda video: torch.empty_like(noise[:1])
            pipeline.encoders.decode = lambda latents: torch.empty_like(frames)
            watch.begin("encoders")
            pipeline.sample([run.PROMPT], frames, given, noise)
        shape = TransformerShape.of(transformer_config(base), config.dlc)
        layout = layout_of(config, *encoder_sizes(base))
        batch = replace(batch_of(config, image_tokens(base)), clips=1)
    return {
        "peaks": {phase: seen.peak for phase, seen in watch.phases.items() if phase},
        "planned": sampling_memory(shape, batch, layout, mode).tensors,
    }


@case
def callbacks() -> object:
    """Two optimiser steps from the first on, with everything that a run logs, measures and saves."""
    import torch

    from one4d_pl.callbacks.losses import LossCurves
    from one4d_pl.callbacks.throughput import StepLine, Throughput
    from one4d_pl.training.checkpoint import take_snapshot
    from one4d_pl.training.step_guard import SkippedSteps

    found = {}

    def of(config: Config) -> list:
        losses, throughput = LossCurves(config.train), Throughput(config.train, 0.5)
        return [throughput, losses, StepLine(config, losses, throughput)]

    def look(trainer, module, watch) -> None:
        (optimizer,) = trainer.optimizers
        kept = [named for state in optimizer.state.values() for named in state.items()]
        found["moments"] = sorted({f"{key} {value.dtype} {value.device}" for key, value in kept})
        found["groups"] = [group["name"] for group in optimizer.param_groups]
        snapshot = take_snapshot(module, optimizer, 1, SkippedSteps(), trainer.datamodule, None)
        tensors = [t for file in snapshot.adapters.values() for t in file.values()] + list(snapshot.moments.values())
        found["snapshot"] = sorted({f"{t.dtype} {t.device}" for t in tensors})
        found["saved"] = sum(t.numel() for file in snapshot.adapters.values() for t in file.values())
        found["trained"] = sum(p.numel() for _, p in module.transformer.trainable_parameters())

    small("train.log_every=1", at_end=look, callbacks=of, largest=False)
    assert torch.cuda.is_available() is False  # what pretended is gone
    return found


@case
def metrics() -> object:
    """Every metric of sampled scenes, on the device."""
    import torch

    from one4d_pl.metrics.camera import CameraError
    from one4d_pl.metrics.depth import VideoDepthError
    from one4d_pl.metrics.pointmap import PointmapError
    from one4d_pl.rehearsal.fake_cuda import pretend
    from one4d_pl.rehearsal.watch import Watch

    watch = Watch()
    with pretend(watch) as device, watch.watching():
        g = torch.Generator().manual_seed(0)

        def drawn(*size: int):
            return torch.rand(size, generator=g, dtype=torch.float64).to(device) + 0.5

        valid = torch.ones(1, 3, 6, 8, dtype=torch.bool, device=device)
        pointmap = PointmapError().to(device)
        pointmap.update(drawn(1, 3, 6, 8, 3), drawn(1, 3, 6, 8, 3), valid, ~valid)
        depth = VideoDepthError("scale_shift").to(device)
        depth.update(drawn(3, 6, 8), drawn(3, 6, 8), valid[0])
        camera = CameraError().to(device)
        pose = torch.eye(4, dtype=torch.float64, device=device).repeat(3, 1, 1)
        moved = pose.clone()
        moved[:, :3, 3] = drawn(3, 3)
        camera.update(moved, moved + 0, torch.ones(3, dtype=torch.bool, device=device))
        values = {**pointmap.compute(), **depth.compute(), **camera.compute()}
        return {name: str(torch.as_tensor(value).device) for name, value in values.items()}


def fault_of(*patches: contextlib.AbstractContextManager[object]) -> str:
    """What a rehearsal says with a fault put back."""
    from one4d_pl.rehearsal.run import Fault

    with contextlib.ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        try:
            small()
        except Fault as fault:
            return str(fault)
    return "no fault"


@case
def generator_fault() -> object:
    """The fault that every first fit on a GPU died of: a draw on the GPU with a CPU generator."""
    import torch

    from one4d_pl.models import lora

    def as_it_was(weight, generator) -> None:
        torch.empty(weight.shape, device=weight.device).uniform_(-1, 1, generator=generator)

    return fault_of(patch.object(lora, "_kaiming_uniform", as_it_was))


@case
def device_fault() -> object:
    """A link that was left on the CPU."""
    import torch

    from one4d_pl.models import control_links

    built = control_links._zero_linear
    return fault_of(
        patch.object(control_links, "_zero_linear", lambda width, device: built(width, torch.device("cpu"))),
        patch("lightning.pytorch.strategies.SingleDeviceStrategy.model_to_device", lambda self: None),
    )


@case
def dtype_fault() -> object:
    """What a bfloat16 base says without autocast."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    return fault_of(patch.object(MixedPrecision, "forward_context", lambda self: contextlib.nullcontext()))


def main(out: str, *names: str) -> int:
    load_device()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = {}
    for name in names or cases:
        try:
            found[name] = cases[name]()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        Path(out).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    from one4d_pl.cluster.signals import end_process

    end_process(lambda: main(*sys.argv[1:]))
