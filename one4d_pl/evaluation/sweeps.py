"""The values swept in One4D's Tables 5 and 6, and which frames a sparse video keeps."""

from __future__ import annotations

import torch

SWEEPS: dict[str, tuple[float, ...]] = {
    "sparsity": (0.50, 0.25, 0.10, 0.05, 0.04, 0.03),  # share of frames that are given (One4D, Table 5)
    "guidance": (4.0, 5.0, 6.0),  # One4D, Table 6
    "steps": (10.0, 20.0, 50.0),  # of the sampler
}


def sparse_indices(num_frames: int, share: float) -> list[int]:
    """List the given frames: max(2, round(share · F)) of them, evenly spaced.

    The paper publishes no list; it keeps the first and last frame and evenly spaced ones between.
    Halves round to even. ValueError unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"sparsity: {share}, need a share of frames above 0 and at most 1")
    count = min(num_frames, max(2, round(share * num_frames)))
    if count == 1:
        return [0]
    return torch.linspace(0, num_frames - 1, count, dtype=torch.float64).round().long().tolist()
