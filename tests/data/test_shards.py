"""Laws of the raw shards: what is written is read back, and whatever is broken is told in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from one4d_pl.data.clip_codec import decode_clip, decode_depth, encode_clip, encode_depth
from one4d_pl.data.shards import Manifest, SampleEntry, SampleError, ShardSet, ShardSetError, write_shards
from one4d_pl.types import Clip
from tests.own_process import in_own_process

T, H, W = 17, 16, 24


def make_clip(key: str = "clip", seed: int = 0) -> Clip:
    """A smooth random clip with sky, holes, arbitrary cameras and every field filled."""
    rng = torch.Generator().manual_seed(seed)
    colours = torch.rand(T, 3, 2, 2, generator=rng) * 255
    frames = torch.nn.functional.interpolate(colours, (H, W), mode="bilinear").permute(0, 2, 3, 1)
    depth = torch.exp(torch.randn(T, H, W, generator=rng) * 2)
    depth[:, :3] = torch.inf
    depth[:, -2:] = torch.nan
    rotation = torch.linalg.qr(torch.randn(T, 3, 3, generator=rng, dtype=torch.float64))[0]
    cam2world = torch.eye(4).repeat(T, 1, 1)
    cam2world[:, :3, :3] = (rotation * torch.linalg.det(rotation)[:, None, None]).float()
    cam2world[:, :3, 3] = torch.randn(T, 3, generator=rng) * 100
    intrinsics = torch.tensor([[W, 0, W / 2], [0, W, H / 2], [0, 0, 1.0]]).repeat(T, 1, 1)
    intrinsics[:, :2] += torch.rand(T, 2, 3, generator=rng)
    return Clip(
        key=key,
        frames=frames.round().to(torch.uint8).contiguous(),
        depth=depth,
        intrinsics=intrinsics,
        cam2world=cam2world,
        valid=depth.isfinite() & (torch.rand(T, H, W, generator=rng) < 0.9),
        moving=torch.rand(T, H, W, generator=rng) < 0.3,
        caption='A "quoted" cat – ein Kätzchen, 猫.',
        source="handmade",
        domain="synthetic",
        fps=29.97,
        licence="CC0-1.0",
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips in shards of two; not to be changed."""
    path = tmp_path_factory.mktemp("pristine")
    write_shards((make_clip(f"clip-{n}", seed=n) for n in range(5)), path, samples_per_shard=2)
    return path


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of `pristine` for one test."""
    return shutil.copytree(pristine, tmp_path / "set")


def index_tar(path: Path) -> list[tuple[str, int, int, int]]:
    """Key, offset, size and CRC-32 of the byte range of each sample of a tar, as tarfile finds them."""
    content, ranges = path.read_bytes(), {}
    with tarfile.open(path) as tar:
        for member in tar:
            key = member.name.split(".", 1)[0]
            start, _ = ranges.get(key, (member.offset, 0))
            ranges[key] = (start, member.offset_data + -(-member.size // 512) * 512)
    return [(key, start, end - start, zlib.crc32(content[start:end])) for key, (start, end) in ranges.items()]


def tamper(folder: Path, index: int, changes: dict[str, bytes | None]) -> None:
    """Replace (or, by None, drop) members of one sample; the manifest then agrees with the new bytes."""
    shard_set = ShardSet.open(folder)
    shards = list(shard_set.manifest.shards)
    number, entry = next((n, e) for n, s in enumerate(shards) for e in s.samples if e.key == shard_set.key(index))
    path = folder / shards[number].name
    with tarfile.open(path) as tar:
        members = [(m.name, changes.get(m.name.removeprefix(f"{entry.key}."), tar.extractfile(m).read())) for m in tar]
    with tarfile.open(path, mode="w") as tar:
        for name, content in members:
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    samples = tuple(SampleEntry(*fields, T, H, W) for fields in index_tar(path))
    shards[number] = dataclasses.replace(shards[number], samples=samples)
    manifest = dataclasses.replace(shard_set.manifest, shards=tuple(shards))
    (folder / "manifest.json").write_text(manifest.to_json())


def assert_one_line(error: BaseException, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


# --- the schema


@pytest.mark.parametrize("with_moving", [True, False])
def test_a_clip_comes_back_from_its_shard(tmp_path, with_moving):
    clip = make_clip()
    clip = clip if with_moving else dataclasses.replace(clip, moving=None)
    back = write_shards([clip], tmp_path, samples_per_shard=1).read(0)
    for name in ("key", "caption", "source", "domain", "fps", "licence"):
        assert getattr(back, name) == getattr(clip, name)
    assert torch.equal(back.intrinsics, clip.intrinsics) and torch.equal(back.cam2world, clip.cam2world)
    assert torch.equal(back.valid, clip.valid)
    assert (back.moving is None) if clip.moving is None else torch.equal(back.moving, clip.moving)
    assert torch.equal(back.depth.isnan(), clip.depth.isnan()) and torch.equal(back.depth.isinf(), clip.depth.isinf())
    torch.testing.assert_close(back.depth, clip.depth, rtol=2e-4, atol=0, equal_nan=True)
    assert back.frames.dtype == torch.uint8
    squared_error = (back.frames.float() - clip.frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / squared_error) >= 40  # dB: no difference can be seen


def test_jpegs_keep_full_colour_resolution():
    with Image.open(io.BytesIO(encode_clip(make_clip())["frame_000.jpg"])) as image:
        assert [component[1:3] for component in image.layer] == [(1, 1)] * 3  # 4:4:4
    with Image.open(io.BytesIO(encode_clip(make_clip())["depth.png"])) as image:
        assert (image.mode, image.size) == ("I;16", (W, T * H))


@pytest.mark.parametrize("near,far", [(1e-3, 1e3), (0.5, 0.5), (1e-30, 1e-20), (1.0, 2e11), (0.01, 65504.0), (7, 7.01)])
def test_depth_codes_are_within_2e_4_over_any_range(near, far):
    depth = np.geomspace(near, far, 100_003, dtype=np.float64).astype(np.float32)
    codes, near_far = encode_depth(depth)
    back = decode_depth(codes, near_far)
    assert np.abs(back / depth.astype(np.float64) - 1).max() <= 2e-4
    assert back.min() == depth.min() and back.max() == depth.max()  # the ends are exact
    assert codes.min() >= 1 and codes.max() <= 65534


def test_depth_too_wide_for_16_bits_is_refused_by_key(tmp_path):
    clip = make_clip("wide")
    clip.depth[0, 8, 0], clip.depth[0, 8, 1] = 1e-8, 1e8
    with pytest.raises(ValueError, match="wide: depth from 1e-08 to 1e") as caught:
        write_shards([clip], tmp_path, samples_per_shard=1)
    assert_one_line(caught.value)
    assert list(tmp_path.iterdir()) == []  # no half-written shard


@pytest.mark.parametrize("everywhere", [torch.nan, torch.inf])
def test_a_clip_without_any_depth_can_be_stored(tmp_path, everywhere):
    clip = make_clip()
    clip = dataclasses.replace(clip, depth=torch.full_like(clip.depth, everywhere), valid=torch.zeros_like(clip.valid))
    back = write_shards([clip], tmp_path, samples_per_shard=1).read(0)
    assert torch.equal(back.depth.isnan(), clip.depth.isnan()) and torch.equal(back.depth.isinf(), clip.depth.isinf())


# --- the folder


def test_every_sample_is_found_by_its_index(folder):
    shard_set = ShardSet.open(folder)
    assert len(shard_set) == 5 and shard_set.samples_per_shard == [2, 2, 1]
    for index in range(5):
        assert shard_set.key(index) == shard_set.read(index).key == f"clip-{index}"
        assert torch.equal(shard_set.read(index).cam2world, make_clip(seed=index).cam2world)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            shard_set.read(index)


def test_stock_webdataset_reads_the_same_samples(folder):
    names = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(names, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"clip-{n}" for n in range(5)]
    for index, sample in enumerate(samples):
        stored = {name: content for name, content in sample.items() if not name.startswith("__")}
        assert stored == encode_clip(make_clip(f"clip-{index}", seed=index))


def test_the_manifests_byte_ranges_are_those_of_the_tar_and_tile_it(folder):
    for shard in ShardSet.open(folder).manifest.shards:
        expected = [(s.key, s.offset, s.size, s.crc32) for s in shard.samples]
        assert index_tar(folder / shard.name) == expected
        end = expected[-1][1] + expected[-1][2]
        assert [offset for _, offset, *_ in expected] == [0, *(start + size for _, start, size, _ in expected[:-1])]
        content = (folder / shard.name).read_bytes()
        assert not any(content[end:]) and len(content) == shard.bytes


def test_the_same_clips_give_the_same_bytes(folder, tmp_path):
    write_shards((make_clip(f"clip-{n}", seed=n) for n in range(5)), tmp_path / "again", samples_per_shard=2)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (tmp_path / "again").iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_folder_is_a_shard_set_only_once_it_is_whole(tmp_path):
    def dying_clips() -> Iterator[Clip]:
        yield from (make_clip(f"clip-{n}") for n in range(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(dying_clips(), tmp_path, samples_per_shard=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(ShardSetError):
        ShardSet.open(tmp_path)
    write_shards([make_clip("clip-0")], tmp_path, samples_per_shard=1)  # clears what the dead run left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard-000000.tar"]
    with pytest.raises(ShardSetError, match="already holds shards"):
        write_shards([make_clip()], tmp_path, samples_per_shard=1)


# --- remote folders: test_ranged_reads.py serves them badly


def test_a_url_needs_one_ranged_read_per_sample(folder, serve):
    server = serve(folder)
    shard_set = ShardSet.open(server.url)
    local = ShardSet.open(folder)
    server.requests.clear()
    assert torch.equal(shard_set.read(3).valid, local.read(3).valid)
    entry = local.manifest.shards[1].samples[1]
    assert server.requests == [("/shard-000001.tar", (entry.offset, entry.offset + entry.size))]


def test_workers_may_fork_after_the_parent_has_read_a_url(folder, serve):
    in_own_process(fork_workers, serve(folder).url)


def fork_workers(url: str) -> None:
    shard_set = ShardSet.open(url)
    expected = torch.stack([shard_set.read(index).cam2world for index in range(5)])
    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    loader = DataLoader(range(5), collate_fn=lambda indices: shard_set.read(indices[0]).cam2world, **options)
    assert torch.equal(torch.stack(list(loader)), expected)


def test_a_shard_set_can_be_pickled(folder):
    shard_set = ShardSet.open(folder)
    assert pickle.loads(pickle.dumps(shard_set)) == shard_set


# --- bad input to the reader


def read_error(folder: Path, index: int) -> SampleError:
    with pytest.raises(SampleError) as caught:
        ShardSet.open(folder).read(index)
    assert_one_line(caught.value, caught.value.shard, caught.value.key, caught.value.reason)
    assert caught.value.key == f"clip-{index}" and caught.value.shard == f"shard-{index // 2:06d}.tar"
    return caught.value


def test_a_truncated_tar_is_told(folder):
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[: ShardSet.open(folder).manifest.shards[1].samples[0].size + 1000])
    assert "cut short" in read_error(folder, 3).reason
    assert ShardSet.open(folder).read(2).key == "clip-2"  # the rest of the shard is fine


def test_a_missing_shard_is_told(folder):
    (folder / "shard-000000.tar").unlink()
    assert "missing" in read_error(folder, 0).reason


def test_every_flipped_byte_is_told(folder):
    path, entry = folder / "shard-000001.tar", ShardSet.open(folder).manifest.shards[1].samples[0]
    whole = path.read_bytes()
    for position in np.linspace(0, entry.size - 1, 50, dtype=int):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert "changed or damaged" in read_error(folder, 2).reason


NAN_WHERE_VALID = dataclasses.replace(make_clip(), depth=torch.full((T, H, W), torch.nan))
SMALLER_FRAME = Image.new("RGB", (W // 2, H))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def meta(**changes: object) -> bytes:
    return json.dumps({**json.loads(encode_clip(make_clip())["meta.json"]), **changes}).encode()


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"frame_003.jpg": b"no picture"}, "frame_003.jpg cannot be decoded"),
        ({"frame_003.jpg": encode_clip(make_clip())["frame_003.jpg"][:400]}, "frame_003.jpg cannot be decoded"),
        ({"frame_003.jpg": encode_clip(make_clip())["depth.png"]}, "frame_003.jpg cannot be decoded"),
        ({"frame_003.jpg": jpeg(SMALLER_FRAME)}, "need RGB (24, 16)"),
        ({"frame_016.jpg": None}, "frame_016.jpg is missing"),
        ({"depth.png": None}, "depth.png is missing"),
        ({"depth.png": encode_clip(NAN_WHERE_VALID)["depth.png"]}, "depth that is nan or infinite is marked valid"),
        ({"depth.png": encode_clip(make_clip())["valid.png"]}, "depth.png cannot be decoded|need I;16"),
        ({"valid.png": b""}, "valid.png cannot be decoded"),
        ({"moving.png": None}, "moving.png is missing"),
        ({"meta.json": None}, "meta.json is missing"),
        ({"meta.json": b"{"}, "meta.json: "),
        ({"meta.json": b"[]"}, "meta.json: "),
        ({"meta.json": meta(version=2)}, "meta.json: need version 1"),
        ({"meta.json": meta(height=H + 1)}, "height 17 differs from the manifest's 16"),
        ({"meta.json": meta(depth_range=[2.0, 1.0])}, "near <= far"),
        ({"meta.json": meta(depth_range=None)}, "depth that is nan or infinite is marked valid"),
        ({"meta.json": meta(cam2world=[[1.0], [2.0, 3.0]])}, "meta.json: "),
        ({"meta.json": meta(cam2world=[[1.0]])}, "cam2world is (1, 1)"),
        ({"meta.json": meta(intrinsics="none")}, "meta.json: "),
        ({"meta.json": meta(fps=-1)}, "fps is -1"),
        ({"meta.json": meta(caption=7)}, "the caption is 7, need a text"),
        ({"meta.json": meta(licence=None)}, "source and licence must be named"),
        ({"meta.json": meta(licence="nan")}, "source and licence must be named"),
        ({"meta.json": meta(source=["a"])}, "source and licence must be named"),
    ],
)
def test_a_broken_member_is_told_by_key_and_name(folder, changes, reason):
    tamper(folder, 3, changes)
    assert any(words in read_error(folder, 3).reason for words in reason.split("|"))
    assert ShardSet.open(folder).read(2).key == "clip-2"


def test_garbage_never_raises_anything_but_value_error():
    clip = make_clip()
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as tar:
        tar.write({"__key__": clip.key, **encode_clip(clip)})
    whole = buffer.getvalue()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for position in rng.integers(0, len(damaged), 5):
            damaged[position] = rng.integers(0, 256)
        try:
            assert decode_clip(bytes(damaged), clip.key, (T, H, W)).key == clip.key  # padding was hit, or a JPEG
        except ValueError as error:
            assert str(error)


def test_a_sample_error_survives_a_process_border():
    error = SampleError("clip-1", "shard-000000.tar", "too bad")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "shard-000000.tar: sample clip-1: too bad"


# --- bad manifests


def broken_manifest(text: str) -> list[str]:
    tree = json.loads(text)
    first = tree["shards"][0]
    sample = first["samples"][0]

    def with_first(**changes: object) -> str:
        return json.dumps({**tree, "shards": [{**first, **changes}]})

    return [
        "",
        "[]",
        text[: len(text) // 2],
        json.dumps({**tree, "version": 99}),
        json.dumps({**tree, "kind": "encoded"}),
        json.dumps({**tree, "shards": []}),
        json.dumps({name: value for name, value in tree.items() if name != "licence"}),
        with_first(name="../shard-000000.tar"),
        with_first(samples=[]),
        with_first(samples=[sample, sample]),
        with_first(samples=[{**sample, "key": "../clip"}]),
        with_first(samples=[{**sample, "offset": -1}]),
        with_first(samples=[{**sample, "size": "12"}]),
        with_first(samples=[{**sample, "height": 10**9}]),
        with_first(samples=[{**sample, "extra": 1}]),
    ]


@pytest.mark.parametrize("case", range(15))
def test_a_broken_manifest_is_told_with_the_command_that_makes_one(folder, case):
    path = folder / "manifest.json"
    path.write_text(broken_manifest(path.read_text())[case])
    with pytest.raises(ShardSetError) as caught:
        ShardSet.open(folder)
    assert_one_line(caught.value, str(folder), "manifest.json", "python -m data_prep.write_shards", "--out")


def test_a_missing_manifest_is_told_with_the_command_that_makes_one(tmp_path, serve):
    for location in (tmp_path, tmp_path / "nowhere", serve(tmp_path).url, "nosuchprotocol://bucket/folder"):
        with pytest.raises(ShardSetError) as caught:
            ShardSet.open(location)
        assert_one_line(caught.value, str(location), "manifest.json", "python -m data_prep.write_shards", "--out")


def test_the_manifest_text_is_the_manifest(folder):
    text = (folder / "manifest.json").read_text()
    assert Manifest.from_json(text) == ShardSet.open(folder).manifest and Manifest.from_json(text).to_json() == text


# --- bad input to the writer


def replaced(**changes: object) -> Clip:
    return dataclasses.replace(make_clip("bad-clip"), **changes)


def cut(num_frames: int) -> Clip:
    clip, index = make_clip("bad-clip"), torch.arange(num_frames) % T
    fields = ("frames", "depth", "intrinsics", "cam2world", "valid", "moving")
    return dataclasses.replace(clip, **{name: getattr(clip, name)[index] for name in fields})


CLIP = make_clip()
REFUSED = {
    "5 frames": lambda: cut(5),
    "18 frames": lambda: cut(18),
    "85 frames": lambda: cut(85),
    "frames is": lambda: replaced(frames=CLIP.frames[:-1]),
    "frames is (17, 16, 24, 3) torch.float32": lambda: replaced(frames=CLIP.frames.float()),
    "depth is": lambda: replaced(depth=CLIP.depth[0]),
    "valid is": lambda: replaced(valid=CLIP.valid[..., :-1]),
    "moving is": lambda: replaced(moving=CLIP.moving.float()),
    "intrinsics is": lambda: replaced(intrinsics=CLIP.intrinsics[:1]),
    "focal length": lambda: replaced(intrinsics=-CLIP.intrinsics),
    "intrinsics are not finite": lambda: replaced(intrinsics=CLIP.intrinsics * torch.nan),
    "cam2world is not finite": lambda: replaced(cam2world=CLIP.cam2world.where(CLIP.cam2world <= 1, torch.nan)),
    "last row": lambda: replaced(cam2world=CLIP.cam2world.mT.contiguous()),
    "no rotation": lambda: replaced(cam2world=CLIP.cam2world @ torch.tensor([1.01, 1, 1, 1]).diag()),
    "a reflection": lambda: replaced(cam2world=CLIP.cam2world @ torch.tensor([-1.0, 1, 1, 1]).diag()),
    "is marked valid": lambda: replaced(valid=torch.ones_like(CLIP.valid)),
    "infinite is marked valid": lambda: replaced(valid=~CLIP.depth.isnan()),
    "values <= 0": lambda: replaced(depth=-CLIP.depth),
    "domain": lambda: replaced(domain="dream"),
    "licence": lambda: replaced(licence=""),
    "fps is": lambda: replaced(fps=0.0),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_the_writer_refuses_a_clip_that_breaks_the_schema(tmp_path, reason):
    with pytest.raises(ValueError) as caught:
        write_shards([make_clip("good"), REFUSED[reason]()], tmp_path, samples_per_shard=1)
    assert_one_line(caught.value, "bad-clip", reason)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("key", ["", "a.b", "../up", "a/b", "a b", "-dash", "ä", "k" * 81])
def test_the_writer_refuses_an_unsafe_key(tmp_path, key):
    with pytest.raises(ValueError, match="key must match"):
        write_shards([make_clip(key)], tmp_path, samples_per_shard=1)


def test_the_writer_refuses_what_does_not_belong_together(tmp_path):
    with pytest.raises(ValueError, match="twice: a second clip"):
        write_shards([make_clip("twice"), make_clip("twice")], tmp_path, samples_per_shard=1)
    with pytest.raises(ValueError, match="other: one folder holds one source"):
        write_shards([make_clip("one"), dataclasses.replace(make_clip("other"), licence="MIT")], tmp_path, 1)
    with pytest.raises(ShardSetError, match="not one clip"):
        write_shards([], tmp_path, samples_per_shard=1)


def test_the_longest_key_fits_the_tar_header(tmp_path):
    assert write_shards([make_clip("k" * 80)], tmp_path, samples_per_shard=1).read(0).key == "k" * 80
