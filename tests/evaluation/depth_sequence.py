"""A benchmark's sequence of given depth maps, without images and cameras."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from one4d_pl.evaluation.benchmarks import EvalSequence


@dataclass(frozen=True)
class DepthSequence(EvalSequence):
    """Depth alone."""

    depth: Tensor  # [T, H, W]

    @staticmethod
    def of(depth: Tensor) -> DepthSequence:
        return DepthSequence("s", len(depth), ("depth",), depth)

    def read_frames(self) -> Tensor:
        raise NotImplementedError("scoring looks at no image")

    def read_depth(self) -> Tensor:
        return self.depth

    def read_cameras(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("only depth is scored")
