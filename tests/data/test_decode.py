"""Laws of the way from raw clip to sample, and of the stream: broken clips are named, counted and replaced alike."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from one4d_pl.config import Config, DataConfig, MaskingConfig, TrainConfig
from one4d_pl.data.decode import (
    MAX_BROKEN,
    ClipStream,
    Draw,
    cut_clip,
    draw_training,
    draw_validation,
    make_sample,
    resize_clip,
)
from one4d_pl.data.masking import task_of
from one4d_pl.data.sample_order import MixtureOrder
from one4d_pl.data.shards import SampleError, ShardSet, write_shards
from one4d_pl.geometry.camera import project, to_camera
from one4d_pl.geometry.pointmap import GEOMETRY_EXTENT, SKY_EXTENT, denormalise
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Clip, Sample, collate
from tests.data.conftest import assert_same, error_here_and_from_worker, flip_byte

CONFIG = DataConfig(num_frames=17, height=16, width=32)
POSITIONS = range(30)  # five epochs of six clips
SHOW_ALL = Draw("video", torch.ones(17, dtype=torch.bool), drop_caption=False)


def toy_clips(count: int) -> list[Clip]:
    return [render_clip(seed, 17, 16, 32) for seed in range(count)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good clips in shards of two; not to be changed."""
    folder = tmp_path_factory.mktemp("shards") / "pristine"
    write_shards(toy_clips(6), folder, samples_per_shard=2)
    return folder


def open_stream(*folders: Path, config: DataConfig = CONFIG, overfit_clips: int = 0) -> ClipStream:
    """As the data module opens it, with equal weights and seed 0."""
    sources = [ShardSet.open(folder) for folder in folders]
    order = MixtureOrder([s.samples_per_shard for s in sources], [1.0] * len(sources), 0, config.block_shards)
    run = Config(data=config, train=TrainConfig(overfit_clips=overfit_clips))
    return ClipStream(sources, [None] * len(sources), order, run, validation=False)


def broken_copy(pristine: Path, folder: Path, *indices: int) -> Path:
    """The same clips, some of them damaged."""
    shutil.copytree(pristine, folder)
    for index in indices:
        flip_byte(ShardSet.open(folder), index)
    return folder


# --- resize and crop


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((48, 96), (16, 32)),  # shrink
        ((16, 32), (32, 64)),  # enlarge
        ((40, 40), (16, 32)),  # rows are cropped
        ((20, 96), (16, 32)),  # columns are cropped
        ((37, 53), (16, 32)),  # odd sizes
        ((23, 91), (32, 48)),
    ],
)
def test_frames_depth_and_intrinsics_are_resized_and_cropped_together(size, target):
    """Each target pixel shows what lies on its own ray: the picture and the depth of the source at that ray."""
    height, width = size
    u, v = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    clip = render_clip(0, 17, height, width)
    clip = dataclasses.replace(
        clip,
        frames=torch.stack([2 * u, 2 * v, 0 * u], -1).to(torch.uint8).expand(17, -1, -1, -1).contiguous(),
        depth=(1000 * v + u).expand(17, -1, -1).contiguous(),
        valid=(u > 7).expand(17, -1, -1).contiguous(),
        moving=(v > 9).expand(17, -1, -1).contiguous(),
    )
    small = resize_clip(clip, *target)
    assert small.frames.shape == (17, *target, 3) and small.frames.dtype == torch.uint8
    fx, fy, cx, cy = (clip.intrinsics[:, i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    gx, gy, px, py = (small.intrinsics[:, i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    torch.testing.assert_close(gx / fx, gy / fy)  # square pixels stay square
    column, row = torch.meshgrid(torch.arange(target[1]) + 0.5, torch.arange(target[0]) + 0.5, indexing="xy")
    u_source, v_source = (column - px) / gx * fx + cx, (row - py) / gy * fy + cy  # the ray of each target pixel
    nearest_v = torch.round(small.depth / 1000 - 0.5) + 0.5  # u is below 500
    nearest_u = small.depth - 1000 * nearest_v
    assert (nearest_u - u_source).abs().max() <= 0.501 and (nearest_v - v_source).abs().max() <= 0.501
    assert torch.equal(small.valid, nearest_u > 7) and torch.equal(small.moving, nearest_v > 9)
    inner = (slice(None), slice(3, -3), slice(3, -3))  # the border has nothing to interpolate with
    colour = small.frames.float() / 2
    assert (colour[..., 0] - u_source.expand_as(small.depth))[inner].abs().max() <= 0.76  # half a code, half a pixel
    assert (colour[..., 1] - v_source.expand_as(small.depth))[inner].abs().max() <= 0.76


def test_a_clip_of_the_right_size_is_left_alone():
    clip = render_clip(0, 17, 16, 32)
    assert resize_clip(clip, 16, 32) is clip


def test_a_clip_without_motion_labels_is_resized_too():
    clip = dataclasses.replace(render_clip(0, 17, 24, 48), moving=None)
    sample = make_sample(clip, 0, SHOW_ALL, CONFIG, None)
    assert sample.moving.shape == (17, 16, 32) and not sample.moving.any()


@pytest.mark.parametrize("size", [(17, 33), (15, 31), (16, 49), (97, 17)])
def test_odd_sizes_become_samples_of_the_configured_size(size):
    sample = make_sample(render_clip(1, 17, *size), 0, SHOW_ALL, CONFIG, None)
    assert sample.frames.shape == sample.pointmap.shape == (3, 17, 16, 32)
    assert sample.valid.shape == sample.moving.shape == (17, 16, 32)
    assert_reprojects(sample)


# --- samples


def assert_reprojects(sample: Sample) -> None:
    """Every valid point of every frame falls on the pixel that shows it, under the sample's own cameras."""
    points = denormalise(sample.pointmap.permute(1, 2, 3, 0), sample.scale)  # [T, H, W, 3], camera 0
    pixels, depth = project(to_camera(points, sample.cam2world), sample.intrinsics)
    height, width = sample.valid.shape[1:]
    centres = torch.stack(torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy"), -1)
    assert (depth[sample.valid] > 0).all()
    assert (pixels - centres)[sample.valid].abs().max() < 0.02  # of a pixel; float32, near points under far cameras


@pytest.mark.parametrize("domain", ["synthetic", "real"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("z_offset", [False, True])
def test_a_sample_lies_within_the_encoders_range_in_camera_0_coordinates(seed, domain, z_offset):
    clip = render_clip(seed, 17, 16, 32, domain)
    sample = make_sample(clip, 7, SHOW_ALL, dataclasses.replace(CONFIG, z_offset=z_offset), None)
    torch.testing.assert_close((sample.frames.permute(1, 2, 3, 0) + 1) * 127.5, clip.frames.float(), rtol=0, atol=1e-4)
    assert sample.frames.abs().max() <= 1
    largest = sample.pointmap.abs().amax(0)  # [T, H, W]
    assert largest.isfinite().all() and largest.max() <= SKY_EXTENT
    assert largest[sample.valid].max() <= GEOMETRY_EXTENT
    assert (largest[clip.depth.isposinf()] == SKY_EXTENT).all()
    assert not (sample.valid & ~clip.valid).any() and sample.valid.float().mean() > 0.3
    torch.testing.assert_close(sample.cam2world[0], torch.eye(4), rtol=0, atol=1e-5)
    assert_reprojects(sample)
    first = denormalise(sample.pointmap.permute(1, 2, 3, 0), sample.scale)[0, ..., 2]  # world = camera 0: z is depth
    given = sample.valid[0]
    torch.testing.assert_close(first[given], clip.depth[0][given], rtol=1e-4, atol=1e-4)
    assert (sample.key, sample.position, sample.caption) == (clip.key, 7, clip.caption)


def test_a_longer_clip_is_cut_to_its_first_frames():
    clip = render_clip(0, 21, 16, 32)
    sample = make_sample(clip, 0, SHOW_ALL, CONFIG, None)
    assert sample.frames.shape[1] == sample.valid.shape[0] == len(sample.intrinsics) == len(sample.cam2world) == 17
    assert_same(sample, make_sample(render_clip(0, 17, 16, 32), 0, SHOW_ALL, CONFIG, None), but=("caption",))


def test_a_clip_too_short_says_how_long_it_is():
    with pytest.raises(ValueError, match=r"has 17 frames, data\.num_frames asks for 21"):
        cut_clip(render_clip(0, 17, 16, 32), 21)


def test_holes_of_nan_depth_stay_finite_and_not_valid():
    clip = render_clip(0, 17, 16, 32)
    depth, valid = clip.depth.clone(), clip.valid.clone()
    depth[3], valid[3] = torch.nan, False  # a frame without any measurement
    depth[:, 4:9, 5:20], valid[:, 4:9, 5:20] = torch.nan, False
    sample = make_sample(dataclasses.replace(clip, depth=depth, valid=valid), 0, SHOW_ALL, CONFIG, None)
    assert sample.pointmap.isfinite().all() and sample.pointmap.abs().max() <= SKY_EXTENT
    assert not sample.valid[depth.isnan()].any() and sample.valid.any()


def test_a_clip_of_nothing_but_nan_depth_is_refused():
    clip = render_clip(0, 17, 16, 32)
    empty = dataclasses.replace(clip, depth=torch.full_like(clip.depth, torch.nan), valid=torch.zeros_like(clip.valid))
    with pytest.raises(ValueError, match="no valid point"):
        make_sample(empty, 0, SHOW_ALL, CONFIG, None)


# --- draws


def test_a_draw_depends_on_seed_and_position_alone():
    def draws(order: range) -> dict[int, tuple[str, bool, list[bool]]]:
        made = {n: draw_training(MaskingConfig(), 0.3, 17, 5, n) for n in order}
        return {n: (d.task, d.drop_caption, d.frame_mask.tolist()) for n, d in made.items()}

    torch.manual_seed(1)
    forwards = draws(range(200))
    torch.manual_seed(2)
    assert draws(range(199, -1, -1)) == forwards
    other_seed = [draw_training(MaskingConfig(), 0.3, 17, 6, n) for n in range(200)]
    assert [d.task for d in other_seed] != [forwards[n][0] for n in range(200)]
    for task, _, given in forwards.values():
        assert task_of(torch.tensor(given)) == task


def test_the_streams_draws_ignore_which_clip_stands_there(pristine, tmp_path):
    other = tmp_path / "other"
    write_shards([render_clip(seed, 17, 16, 32) for seed in (20, 21, 22)], other, samples_per_shard=3)
    one, two = open_stream(pristine), open_stream(other, pristine)
    assert [one[n].key for n in POSITIONS] != [two[n].key for n in POSITIONS]
    for n in POSITIONS:
        a, b = one[n], two[n]
        assert (a.task, a.drop_caption, a.position) == (b.task, b.drop_caption, n)
        assert torch.equal(a.frame_mask, b.frame_mask)


def test_captions_are_dropped_at_their_share_whatever_the_task():
    draws = [draw_training(MaskingConfig(), 0.1, 17, 0, n) for n in range(4000)]
    dropped = Counter(d.task for d in draws if d.drop_caption)
    total = Counter(d.task for d in draws)
    assert abs(sum(dropped.values()) - 400) <= 4.5 * 19  # binomial spread: sqrt(4000 x 0.1 x 0.9) = 19
    for task, count in total.items():
        assert abs(dropped[task] / count - 0.1) <= 4.5 * (0.09 / count) ** 0.5
    kept = [draw_training(MaskingConfig(), 0.0, 17, 0, n) for n in range(100)]
    assert not any(d.drop_caption for d in kept)
    assert [d.task for d in kept] == [d.task for d in draws[:100]]  # the share does not disturb the other draws
    assert all(draw_training(MaskingConfig(), 1.0, 17, 0, n).drop_caption for n in range(100))


def test_validation_walks_through_the_trained_tasks_with_every_caption():
    paper = [draw_validation(MaskingConfig(), 17, 0, n) for n in range(9)]
    assert [d.task for d in paper] == ["image", "sparse", "video"] * 3
    with_text = MaskingConfig(0.1, 0.315, 0.27, 0.315)
    assert [draw_validation(with_text, 17, 0, n).task for n in range(4)] == ["text", "image", "sparse", "video"]
    assert not any(d.drop_caption for d in paper)
    again = [draw_validation(MaskingConfig(), 17, 0, n) for n in range(9)]
    assert all(torch.equal(a.frame_mask, b.frame_mask) for a, b in zip(paper, again))


def test_overfitting_repeats_the_first_clips_with_new_draws(pristine):
    everything, few = open_stream(pristine), open_stream(pristine, overfit_clips=2)
    keys = [everything[n].key for n in range(2)]
    assert [few[n].key for n in range(10)] == keys * 5
    assert [few[n].task for n in range(30)] == [everything[n].task for n in range(30)]
    assert [few[n].position for n in range(10)] == list(range(10))


# --- broken clips


def test_broken_clips_are_named_counted_and_replaced(pristine, tmp_path, caplog):
    whole, damaged = open_stream(pristine), broken_copy(pristine, tmp_path / "set", 1, 4)
    stream = open_stream(damaged)
    broken = {stream.sources[0].key(index) for index in (1, 4)}
    replaced = 0
    for n in POSITIONS:
        expected, actual = whole[n], stream[n]
        assert actual.key not in broken
        if expected.key not in broken:
            assert_same(actual, expected)
            continue
        replaced += 1
        shard = stream.sources[0].locate(stream.order.locate(n).index)[0].name
        assert actual.skipped[0].startswith(f"{shard}: sample {expected.key}: ")
        assert "checksum" in actual.skipped[0] and "\n" not in actual.skipped[0]
        stand_ins = (stream.sources[0].key(stream.order.replacement(n, attempt).index) for attempt in range(5))
        assert actual.key == next(key for key in stand_ins if key not in broken)
        assert len(actual.skipped) == len({*actual.skipped}) <= 2
        # the stand-in takes the draws of the position
        assert (actual.position, actual.task, actual.drop_caption) == (n, expected.task, expected.drop_caption)
        assert torch.equal(actual.frame_mask, expected.frame_mask)
    assert replaced == 10  # two of six clips over five epochs
    assert all(key in caplog.text for key in broken) and str(damaged) in caplog.text


def test_a_broken_clip_is_read_once_and_changes_nothing_by_being_known(pristine, tmp_path, caplog, monkeypatch):
    """A process that met it before, one that did not, and one that resumes: the same stand-ins, the same counts."""
    damaged = broken_copy(pristine, tmp_path / "set", 1, 4)
    knowing = open_stream(damaged)
    broken = {knowing.sources[0].key(index) for index in (1, 4)}
    reads = Counter[str]()
    read = ShardSet.read

    def counted(source: ShardSet, index: int) -> Clip:
        reads[source.key(index)] += 1
        return read(source, index)

    monkeypatch.setattr(ShardSet, "read", counted)
    first = [knowing[n] for n in POSITIONS]
    assert {reads[key] for key in broken} == {1} and len(caplog.records) == 2  # said once each
    for n in POSITIONS:
        for stream in (knowing, open_stream(damaged), pickle.loads(pickle.dumps(knowing))):
            assert_same(stream[n], first[n])


def test_every_stream_finds_the_same_stand_in(pristine, tmp_path):
    damaged = broken_copy(pristine, tmp_path / "set", 0, 2, 3)
    one, two = open_stream(damaged), open_stream(damaged)
    second = {n: two[n] for n in reversed(POSITIONS)}
    for n in POSITIONS:
        assert_same(one[n], second[n])
    stand_ins = {one[n].key for n in POSITIONS if one[n].skipped}
    assert stand_ins == {one.sources[0].key(index) for index in (1, 4, 5)}  # not always the same neighbour


def test_the_batch_counts_what_its_samples_stand_in_for(pristine, tmp_path):
    stream = open_stream(broken_copy(pristine, tmp_path / "set", 1, 4))
    samples = [stream[n] for n in range(6)]
    batch = collate(samples)
    assert len(batch.skipped) == sum(len(s.skipped) for s in samples) >= 2
    assert set(batch.skipped) == {reason for s in samples for reason in s.skipped}


def test_a_missing_and_a_truncated_shard_are_skipped(pristine, tmp_path):
    folder = broken_copy(pristine, tmp_path / "set")
    (folder / "shard-000000.tar").unlink()
    cut = folder / "shard-000001.tar"
    cut.write_bytes(cut.read_bytes()[:-20_000])  # its second clip
    stream = open_stream(folder)
    reasons = "\n".join(reason for n in range(12) for reason in stream[n].skipped)
    assert "the shard file is missing" in reasons and "cut short" in reasons
    alive = {stream[n].key for n in range(12)}
    assert alive == {stream.sources[0].key(index) for index in (2, 4, 5)}


def test_clips_without_geometry_or_too_short_are_skipped_with_their_reason(tmp_path):
    clips = [render_clip(seed, 21, 16, 32) for seed in range(3)]
    nan = torch.full_like(clips[0].depth, torch.nan)
    empty = dataclasses.replace(clips[0], key="empty", depth=nan, valid=torch.zeros_like(clips[0].valid))
    short = dataclasses.replace(render_clip(9, 17, 16, 32), key="short")
    write_shards([*clips, empty, short], tmp_path / "set", samples_per_shard=5)
    stream = open_stream(tmp_path / "set", config=dataclasses.replace(CONFIG, num_frames=21))
    reasons = {reason for n in range(10) for reason in stream[n].skipped}
    assert len(reasons) == 2
    assert any("sample empty: " in reason and "no valid point" in reason for reason in reasons)
    assert any("sample short: has 17 frames" in reason for reason in reasons)


def test_a_stand_in_comes_from_the_same_source(pristine, tmp_path):
    other = tmp_path / "other"
    clips = (dataclasses.replace(render_clip(seed, 17, 16, 32), source="other") for seed in (20, 21, 22))
    write_shards(clips, other, samples_per_shard=3)
    key = flip_byte(ShardSet.open(other), 1)
    stream = open_stream(pristine, other)
    own = {stream.sources[1].key(index) for index in (0, 2)}
    replaced = [stream[n] for n in POSITIONS if stream[n].skipped]
    assert replaced and all(key in sample.skipped[0] and sample.key in own for sample in replaced)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_source_of_broken_clips_is_one_error_that_tries_each_clip_once(count, tmp_path, caplog):
    folder = tmp_path / "set"
    write_shards(toy_clips(count), folder, samples_per_shard=2)
    for index in range(count):
        flip_byte(ShardSet.open(folder), index)
    stream = open_stream(folder)
    with pytest.raises(SampleError) as caught:
        stream[3]
    message = str(caught.value)
    first = stream.sources[0].key(stream.order.locate(3).index)
    assert "\n" not in message and str(folder) in message and f"sample {first}: " in message
    assert f"{count} of {count} samples" in message
    assert sorted(record.args[0].key for record in caplog.records) == [clip.key for clip in toy_clips(count)]


def test_a_large_source_of_broken_clips_is_given_up_soon(tmp_path, caplog):
    folder = tmp_path / "set"
    clip = render_clip(0, 17, 16, 32)
    write_shards((dataclasses.replace(clip, key=f"clip-{n:02d}") for n in range(30)), folder, samples_per_shard=30)
    (folder / "shard-000000.tar").unlink()
    with pytest.raises(SampleError, match=f"{MAX_BROKEN} of 30 samples"):
        open_stream(folder)[0]
    assert len(caplog.records) == len({record.args[0].key for record in caplog.records}) == MAX_BROKEN


def test_the_error_of_a_broken_source_crosses_the_border_of_a_worker_process(tmp_path):
    folder = tmp_path / "set"
    write_shards(toy_clips(1), folder, samples_per_shard=1)
    key = flip_byte(ShardSet.open(folder), 0)
    stream = open_stream(folder)
    here, there = error_here_and_from_worker(lambda: stream[0], SampleError)
    assert there == here and key in here  # torch hands over a traceback; the door wants the one line
