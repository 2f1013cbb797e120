"""Laws of Unified Masked Conditioning's draw: its probabilities, its counts, and what every task shows."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from one4d_pl.config import MaskingConfig
from one4d_pl.data.masking import draw_frame_mask, draw_task, task_of
from one4d_pl.data.sample_order import derived_numpy_generator
from one4d_pl.types import TASKS

DRAWS = 4000
SIGMAS = 4.5  # of the binomial spread; a false alarm would be one seed in 10^5, and these seeds are fixed


def generator(position: int, purpose: str = "frames") -> np.random.Generator:
    """As the training stream makes them: one per position."""
    return derived_numpy_generator(0, position, purpose)


def sparse_masks(num_frames: int) -> torch.Tensor:  # [DRAWS, T] bool
    return torch.stack([draw_frame_mask("sparse", num_frames, generator(n)) for n in range(DRAWS)])


def assert_share(count: int, share: float) -> None:
    spread = math.sqrt(DRAWS * share * (1 - share))
    assert abs(count - DRAWS * share) <= SIGMAS * spread, (count / DRAWS, share)


@pytest.mark.parametrize(
    "probs",
    [(0.0, 0.35, 0.30, 0.35), (0.1, 0.315, 0.27, 0.315), (0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0)],
    ids=["paper", "tiny", "video only", "text only"],
)
def test_tasks_come_with_their_probabilities(probs):
    config = MaskingConfig(*probs)
    counts = Counter(draw_task(config, generator(n, "task")) for n in range(DRAWS))
    for task, prob in zip(TASKS, probs, strict=True):
        assert_share(counts[task], prob)  # spread 0: a task of probability 0 never comes, one of 1 always


@pytest.mark.parametrize("num_frames", [5, 9, 17, 81])
def test_every_task_shows_the_frames_of_its_name(num_frames):
    assert not draw_frame_mask("text", num_frames, generator(0)).any()
    assert draw_frame_mask("image", num_frames, generator(0)).nonzero().flatten().tolist() == [0]
    assert draw_frame_mask("video", num_frames, generator(0)).all()
    for task in TASKS:
        given = draw_frame_mask(task, num_frames, generator(0))
        assert given.shape == (num_frames,) and given.dtype == torch.bool


@pytest.mark.parametrize("num_frames", [5, 9, 17])
def test_sparse_counts_cover_2_to_one_less_than_all_log_uniformly(num_frames):
    counts = Counter(sparse_masks(num_frames).sum(1).tolist())
    assert set(counts) == set(range(2, num_frames))
    for count, seen in counts.items():
        # the floor of a log-uniform number in [2, T)
        assert_share(seen, math.log((count + 1) / count) / math.log(num_frames / 2))


def test_sparse_counts_of_81_frames_halve_from_octave_to_octave():
    counts = sparse_masks(81).sum(1)
    assert (counts.min(), counts.max() <= 80, counts.max() > 70) == (2, True, True)
    for low in (2, 4, 8, 16, 32):
        assert_share(int(((counts >= low) & (counts < 2 * low)).sum()), math.log(2) / math.log(81 / 2))


@pytest.mark.parametrize("num_frames", [5, 9, 17, 81])
def test_sparse_always_shows_frame_0_and_the_last_half_the_time(num_frames):
    given = sparse_masks(num_frames)
    assert given[:, 0].all()
    assert_share(int(given[:, -1].sum()), 0.5)


@pytest.mark.parametrize("num_frames", [9, 17])
def test_sparse_frames_between_are_uniform(num_frames):
    shown = sparse_masks(num_frames)[:, 1:-1].sum(0).double()  # [T-2]
    share = float(shown.mean()) / DRAWS
    assert (shown - DRAWS * share).abs().max() <= SIGMAS * math.sqrt(DRAWS * share * (1 - share))


@pytest.mark.parametrize("num_frames", [5, 9, 17])
@pytest.mark.parametrize("task", TASKS)
def test_task_of_inverts_the_draw(task, num_frames):
    assert {task_of(draw_frame_mask(task, num_frames, generator(n))) for n in range(300)} == {task}


def test_a_single_frame_that_is_not_the_first_is_sparse():
    given = torch.zeros(9, dtype=torch.bool)
    given[3] = True
    assert task_of(given) == "sparse"


@pytest.mark.parametrize("task", TASKS)
def test_the_draw_depends_on_its_generator_alone(task):
    torch.manual_seed(1)
    np.random.seed(1)
    first = [draw_frame_mask(task, 17, generator(n)) for n in range(50)]
    torch.manual_seed(2)
    np.random.seed(2)
    second = [draw_frame_mask(task, 17, generator(n)) for n in reversed(range(50))][::-1]
    assert torch.equal(torch.stack(first), torch.stack(second))


def test_the_draws_are_pinned():
    """A change of these values (numpy's included) breaks the exact resume of every run in flight."""
    config = MaskingConfig()
    assert [draw_task(config, generator(n, "task")) for n in range(8)] == GOLDEN_TASKS
    assert [draw_frame_mask("sparse", 9, generator(n)).nonzero().flatten().tolist() for n in range(4)] == GOLDEN_FRAMES


GOLDEN_TASKS = ["video", "image", "image", "image", "image", "sparse", "image", "video"]
GOLDEN_FRAMES = [[0, 1, 2, 5, 6, 7], [0, 1, 3, 4, 5, 6, 8], [0, 1, 2, 3, 4, 6, 7, 8], [0, 1, 2, 3, 4, 6, 7]]
