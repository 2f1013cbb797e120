"""Perceptual distance of frames: shift-tolerant LPIPS, under the name st_lpips.

The method is that of Ghildyal & Liu (ECCV 2022). The calibrated AlexNet weights (BSD 2-Clause) come
from the package `stlpips-pytorch`, the extra `st-lpips`. Only that package's weight file is read,
because its code imports what only training needs. Values of st_lpips are not comparable with LPIPS:
both grow with what people see as different, each on its own scale.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, pad, relu

from one4d_pl.errors import reading

PACKAGE, WEIGHTS = "stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth"
MIN_SIDE = 21  # pixels a side; in smaller frames the reflected border is wider than the features
FRAMES_AT_ONCE = 4  # the first layer has 64 channels at full resolution
# name in the file, padding, whether the input is max-pooled
LAYERS = (
    ("slice1.0", 2, False), ("slice2.5", 2, True), ("slice3.9", 1, True), ("slice4.11", 1, False),
    ("slice5.13", 1, False),
)  # fmt: skip

log = logging.getLogger(__name__)


class STLPIPS(nn.Module):
    """Distance of two pictures in the features of an AlexNet that blurs before every stride."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Take `weights` by their names in the package's file; KeyError where one is missing."""
        super().__init__()
        for name in ("shift", "scale"):
            self.register_buffer(name, weights[f"scaling_layer.{name}"])  # [1, 3, 1, 1]
        for number, (name, _, _) in enumerate(LAYERS):
            for part in ("weight", "bias"):
                self.register_buffer(f"{part}{number}", weights[f"net.{name}.{part}"])
            self.register_buffer(f"calibration{number}", weights[f"lin{number}.model.1.weight"])  # [1, C, 1, 1]

    @staticmethod
    def open(path: Path) -> STLPIPS:
        """Read the package's weight file; nothing but tensors is loaded."""
        with reading(path, f"the weights of {PACKAGE}"):
            return STLPIPS(torch.load(path, map_location="cpu", weights_only=True)).eval()

    @torch.no_grad()
    def forward(self, preds: Tensor, target: Tensor) -> Tensor:  # [N, 3, H, W] x 2 in [-1, 1] -> [N]
        """Return the distance: the calibrated squared difference of unit features.

        It is averaged over the picture and summed over the layers.
        """
        total = preds.new_zeros(len(preds), dtype=torch.float32)
        for number, (ours, truth) in enumerate(zip(self._features(preds), self._features(target), strict=True)):
            squared = (_unit(ours) - _unit(truth)).square()
            total += conv2d(squared, self.get_buffer(f"calibration{number}")).mean((1, 2, 3))
        return total

    def _features(self, pictures: Tensor) -> list[Tensor]:
        hidden, found = (pictures.float() - self.get_buffer("shift")) / self.get_buffer("scale"), []
        for number, (_, padding, pooled) in enumerate(LAYERS):
            if pooled:
                hidden = _halve(max_pool2d(hidden, 3, stride=1))
            weight, bias = self.get_buffer(f"weight{number}"), self.get_buffer(f"bias{number}")
            hidden = conv2d(hidden, weight, bias, padding=padding)
            hidden = relu(_halve(hidden) if number == 0 else hidden)
            found.append(hidden)
        return found


def st_lpips(
    preds: Tensor,  # [N, 3, T, H, W] in [-1, 1]
    target: Tensor,  # [N, 3, T, H, W] in [-1, 1]
    given: Tensor,  # [N, T] bool, 1 = the model was shown this frame
) -> dict[str, float]:
    """Average over clips the distance of given and of hidden frames.

    Returns {"given", "hidden"}, each where there are such frames; {}, logged once, without the
    extra `st-lpips` or for frames that are too small.
    """
    if min(preds.shape[-2:]) < MIN_SIDE:
        _log_left_out(f"frames need {MIN_SIDE} pixels a side")
        return {}
    if (network := open_st_lpips()) is None:
        return {}
    network = network.to(preds.device)
    found: dict[str, list[float]] = {"given": [], "hidden": []}
    for ours, truth, shown in zip(preds, target, given, strict=True):
        distance = frame_distances(network, ours, truth)
        for name, frames in (("given", shown), ("hidden", ~shown)):
            if bool(frames.any()):
                found[name].append(float(distance[frames].mean()))
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def open_st_lpips() -> STLPIPS | None:
    """Open the network with the package's weights; None, logged once, without the extra."""
    package = importlib.util.find_spec(PACKAGE)  # does not run its code
    if package is None or package.origin is None:
        _log_left_out("it needs `pip install 'one4d_pl[st-lpips]'`")
        return None
    return STLPIPS.open(Path(package.origin).parent / WEIGHTS)


def frame_distances(network: STLPIPS, preds: Tensor, target: Tensor) -> Tensor:  # [3, T, H, W] x 2 -> [T]
    """Measure the distance of every frame of one video."""
    pairs = zip(preds.movedim(0, 1).split(FRAMES_AT_ONCE), target.movedim(0, 1).split(FRAMES_AT_ONCE), strict=True)
    return torch.cat([network(ours, truth) for ours, truth in pairs])


@functools.cache
def _log_left_out(reason: str) -> None:
    log.info("st_lpips is left out: %s", reason)


def _halve(hidden: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C, H', W']
    """Blur by (1, 2, 1) / 4 each way, borders reflected by two pixels; take every second pixel."""
    line = hidden.new_tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(hidden.shape[1], 1, 3, 3)
    return conv2d(pad(hidden, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=hidden.shape[1])


def _unit(features: Tensor) -> Tensor:  # [N, C, H, W]
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
