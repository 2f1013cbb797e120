"""The fastest way to sample that fits a GPU's memory (costs/sampling.py), for a base and a size of the scene."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from one4d_pl.config import Config
from one4d_pl.costs.flops import TransformerShape, peak_flops
from one4d_pl.costs.memory import batch_of, layout_of
from one4d_pl.costs.sampling import MODES, SamplingMode, best_mode, sampling_memory, scene_seconds
from one4d_pl.errors import UserError
from one4d_pl.models.base_files import encoder_sizes, image_tokens, resolve_base, transformer_config

GIB = 2**30
HFU = 0.5  # share of a GPU's peak that is taken for its speed, as by `one4d plan`
log = logging.getLogger("one4d_pl")


def choose_mode(config: Config, gib: float, device: torch.device) -> SamplingMode:
    """Choose and say how to sample within `gib` GiB; UserError where no way fits.

    Args:
        config: base, dlc, sampler, precision, and in `data` the size of the scene.
        gib: the memory to stay within.
        device: where it is a known GPU, the seconds of a scene are said, too.
    """
    folder = resolve_base(config.base.path)
    shape = TransformerShape.of(transformer_config(folder), config.dlc)
    layout = layout_of(config, *encoder_sizes(folder))
    batch = replace(batch_of(config, image_tokens(folder)), clips=1)
    mode = best_mode(shape, batch, layout, gib * GIB)
    if mode is None:
        least = min(sampling_memory(shape, batch, layout, m).total for m in MODES) / GIB
        data = config.data
        raise UserError(
            f"memory: {gib:g} GiB; {data.num_frames} frames of {data.height}x{data.width} need {least:.1f} at least; "
            "make the scene smaller or shorter"
        )
    memory = sampling_memory(shape, batch, layout, mode)
    words = f"planned {memory.total / GIB:.1f} of {gib:g} GiB"
    if memory.host:
        words += f", {memory.host / GIB:.1f} GiB in host memory"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if peak := peak_flops(name, config.train.precision):
        seconds = scene_seconds(shape, batch, layout, mode, config.sampler.steps, HFU * peak)
        words += f", about {seconds:.0f} s a scene"
    log.info("memory: %s (%s)", mode.title, words)
    return mode
