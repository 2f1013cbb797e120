"""Laws of every source: a toy scene in the raw format comes back as it was filmed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.sources import registry
from data_prep.sources.decoding import read_video
from one4d_pl.data.clip_codec import clip_fault
from one4d_pl.scene.media import VideoReader
from one4d_pl.types import Clip
from tests.data_prep import label_layouts
from tests.data_prep import raw_layouts as raw
from tests.data_prep.raw_layouts import Shot, film

TUM_CAMERA = np.array([[535.4, 0, 320.1 + 0.5], [0, 539.2, 247.6 + 0.5], [0, 0, 1]])  # freiburg3
BONN_CAMERA = np.array([[542.822841, 0, 315.593520 + 0.5], [0, 542.576870, 237.756098 + 0.5], [0, 0, 1]])
TARTANAIR_CAMERA = np.array([[320.0, 0, 320], [0, 320, 240], [0, 0, 1]])
NO_SKY = 4  # a seed


def worst_reprojection(clip: Clip, shot: Shot) -> float:
    """Pixels between where the true and the read cameras see the points of each frame: in it, the first, the last."""
    points = torch.from_numpy(raw.world_points(shot)).double()
    seen = points.isfinite().all(-1)
    true_first, read_first = (torch.as_tensor(c[0]).double() for c in (shot.cam2world, clip.cam2world))
    to_read_world = read_first @ torch.linalg.inv(true_first)  # worlds may differ by a rigid motion
    worst = 0.0
    for i in range(len(points)):
        for j in {0, i, len(points) - 1}:
            pixels = []
            for intrinsics, cam2world, world in (
                (shot.intrinsics, shot.cam2world, torch.eye(4).double()),
                (clip.intrinsics, clip.cam2world, to_read_world),
            ):
                world2cam = torch.linalg.inv(torch.as_tensor(cam2world[j]).double()) @ world
                camera = points[i][seen[i]] @ world2cam[:3, :3].T + world2cam[:3, 3]
                projected = camera @ torch.as_tensor(intrinsics[j]).double().T
                pixels.append((projected[:, :2] / projected[:, 2:], camera[:, 2]))
            inside = (pixels[0][1] > 0.1) & (pixels[0][0].abs() < 2 * max(shot.size)).all(-1)
            worst = max(worst, float((pixels[0][0] - pixels[1][0])[inside].abs().max()))
    return worst


def check(clip: Clip, shot: Shot, depth_error: np.ndarray | float, lossy: bool = False, sky: bool = True) -> None:
    """The law: frames, depth, cameras and validity are those of the shot."""
    assert clip_fault(clip) is None
    frames = clip.frames.numpy().astype(float)
    if lossy:
        assert 10 * np.log10(255**2 / np.square(frames - shot.frames).mean()) >= 40  # dB
    else:
        np.testing.assert_array_equal(frames, shot.frames)
    read, known = clip.depth.numpy().astype(float), np.isfinite(shot.depth)
    np.testing.assert_array_equal(np.isinf(read), ~known & sky)
    np.testing.assert_array_equal(clip.valid.numpy(), known)
    assert known.mean() > 0.5 and (np.abs(read - np.where(known, shot.depth, 0)) <= depth_error)[known].all()
    assert worst_reprojection(clip, shot) <= 0.01


def only(source: str, root: Path, **options: object) -> Clip:
    (clip,) = registry.iter_clips(source, root, num_frames=9, **options)  # type: ignore[arg-type]
    assert clip.source == source
    return clip


@pytest.fixture(scope="module")
def shot() -> Shot:
    shot = film()
    assert 0.05 < np.isinf(shot.depth).mean() < 0.5 and shot.moving.any()  # nothing is tested where there is no sky
    return shot


def test_tartanair(tmp_path):
    shot = film(height=32, width=128 // 3, intrinsics=TARTANAIR_CAMERA, enlarge=15)
    frames = [
        np.pad(a, ((0, 0), (0, 0), (0, 640 - a.shape[2]), *[(0, 0)] * (a.ndim - 3)), mode="edge")
        for a in (shot.frames, shot.depth, shot.moving)
    ]
    shot = Shot(frames[0], frames[1], shot.intrinsics, shot.cam2world, frames[2])
    clip = only("tartanair", raw.write_tartanair(tmp_path, shot))
    check(clip, shot, depth_error=1e-5)
    assert clip.key == "seaside-Easy-P000-000003"


def omniworld_depth(code: np.ndarray) -> np.ndarray:
    return code / 65535 / (1000 - 999 * code / 65535) / 0.004


def test_omniworld(tmp_path, shot):
    clip = only("omniworld", raw.write_omniworld(tmp_path, shot))
    near = 0.004 * np.where(np.isinf(shot.depth), 1, shot.depth)
    code = 65535 * 1000 * near / (1 + 999 * near)
    check(clip, shot, depth_error=omniworld_depth(code + 0.51) - omniworld_depth(code))  # half a code, rounded up
    assert clip.caption == "toys move about" and clip.fps == 24
    assert clip.key == "b04f88d1f85a-1-000007"


def test_bedlam(tmp_path, shot):
    clip = only("bedlam", raw.write_bedlam(tmp_path, shot))
    check(clip, shot, depth_error=1e-5)
    assert clip.fps == 6


@pytest.mark.parametrize("turned", [False, True])
def test_bedlam_closeups_stand_upright(tmp_path, shot, turned):
    clip = only(
        "bedlam", raw.write_bedlam(tmp_path, shot, scene="20221019_1_250_highbmihand_closeup_suburb_b", turned=turned)
    )
    upright = np.eye(4)
    upright[:3, 0], upright[:3, 1] = [0, -1, 0], [1, 0, 0]  # its right is the lying camera's up, its down is its right
    k = np.zeros_like(shot.intrinsics)
    k[:, 0, 0] = k[:, 1, 1] = shot.intrinsics[:, 0, 0]
    k[:, 0, 2], k[:, 1, 2], k[:, 2, 2] = shot.size[0] / 2, shot.size[1] / 2, 1
    frames, depth, moving = (np.rot90(a, -1, axes=(1, 2)) for a in (shot.frames, shot.depth, shot.moving))
    check(clip, Shot(frames, depth, k, shot.cam2world @ upright, moving), depth_error=1e-5)


def test_pointodyssey(tmp_path, shot):
    clip = only("pointodyssey", raw.write_pointodyssey(tmp_path, shot))
    check(clip, shot, depth_error=1000 / 65535 / 2 + 1e-6, lossy=True)


@pytest.mark.parametrize("indexes", [False, True])
def test_spatialvid_with_its_own_depth(tmp_path, shot, indexes):
    clip = only("spatialvid", raw.write_spatialvid(tmp_path, shot, indexes))
    check(clip, shot, depth_error=shot.depth * 2**-11 + 1e-6, lossy=True, sky=False)  # half floats
    np.testing.assert_array_equal(clip.moving, shot.moving)
    assert clip.caption == "Toys lie about. It turns." and clip.domain == "real"
    assert clip.fps == pytest.approx(10 / (3 if indexes else 2))


def test_spatialvid_with_pseudo_geometry_of_chosen_video_frames(tmp_path, shot):
    root = raw.write_spatialvid(tmp_path / "data", shot, depth=False)
    pseudo = tmp_path / "geo4d" / "group_0001" / "65612f9c-b702-5626-a4e9-5ddbea42149d.npz"
    pseudo.parent.mkdir(parents=True)
    np.savez(pseudo, frame_numbers=np.arange(0, 18, 2), **raw.generic_arrays(shot, pointmaps=True))
    clip = only("spatialvid", root, geometry=tmp_path / "geo4d")
    check(clip, shot, depth_error=1e-4, lossy=True, sky=False)


@pytest.mark.parametrize("layout", ["tum", "bonn"])
def test_rgbd(tmp_path, layout):
    camera = TUM_CAMERA if layout == "tum" else BONN_CAMERA
    shot = film(height=32, width=42, intrinsics=camera, enlarge=15, seed=NO_SKY)
    far = shot.depth * 5000 >= 65535  # 13.1 m
    folder = "rgbd_dataset_freiburg3_walking_xyz" if layout == "tum" else "rgbd_bonn_crowd"
    clip = only("rgbd", raw.write_rgbd(tmp_path, shot, folder), stride=1)
    seen = Shot(shot.frames, np.where(far, np.inf, shot.depth), shot.intrinsics, shot.cam2world, shot.moving)
    check(clip, seen, depth_error=1e-4 + 1e-6, sky=False)
    assert clip.fps == pytest.approx(30, rel=1e-4)


Writer = Callable[..., Path]


@pytest.mark.parametrize("write", [raw.write_generic_npz, raw.write_generic_folder])
@pytest.mark.parametrize("pointmaps", [False, True])
def test_generic(tmp_path, shot, write: Writer, pointmaps):
    clip = only("generic", write(tmp_path, shot, pointmaps=pointmaps))
    check(clip, shot, depth_error=1e-4, sky=not pointmaps)
    np.testing.assert_array_equal(clip.moving, shot.moving)
    assert (clip.caption, clip.licence, clip.domain, clip.fps) == ("toys", "CC0-1.0", "synthetic", 12)


@pytest.mark.parametrize("seed", [2, 4])  # a fixed focal length; a zoom
def test_generic_pointmaps_without_cameras_are_solved(tmp_path, seed):
    shot = film(seed=seed)
    assert (shot.intrinsics[-1, 0, 0] > 1.1 * shot.intrinsics[0, 0, 0]) == (seed == 4)
    clip = only("generic", raw.write_generic_npz(tmp_path, shot, pointmaps=True, cameras=False))
    check(clip, shot, depth_error=np.where(np.isinf(shot.depth), 0, shot.depth) * 1e-4, sky=False)


def test_confidence_and_valid_make_pixels_invalid(tmp_path, shot):
    root = raw.write_generic_folder(tmp_path, shot)
    confidence = np.random.default_rng(0).uniform(1, 5, shot.depth.shape).astype(np.float32)
    valid = np.random.default_rng(1).uniform(size=shot.depth.shape) > 0.3
    np.save(root / "scene_one" / "confidence.npy", confidence)
    np.save(root / "scene_one" / "valid.npy", valid)
    clip = only("generic", root, min_confidence=3.0)
    np.testing.assert_array_equal(clip.valid, np.isfinite(shot.depth) & valid & (confidence >= 3))
    np.save(root / "scene_one" / "confidence.npy", confidence - 10)  # logits, and no threshold
    np.testing.assert_array_equal(only("generic", root).valid, np.isfinite(shot.depth) & valid)


def test_geometry_that_is_smaller_than_the_frames_is_fitted_to_their_centre(tmp_path):
    small, large = film(height=24, width=32, seed=NO_SKY), film(height=48, width=64, seed=NO_SKY)
    wide = np.pad(large.frames, ((0, 0), (0, 0), (6, 6), (0, 0)))  # 48 x 76: the geometry is of its centre
    root = raw.write_generic_folder(tmp_path, small)
    for t, frame in enumerate(wide):
        raw.Image.fromarray(frame).save(root / "scene_one" / "frames" / f"{t:04d}.png")
    clip = only("generic", root)
    np.testing.assert_array_equal(clip.frames, large.frames)
    np.testing.assert_array_equal(clip.depth, small.depth.repeat(2, 1).repeat(2, 2).astype(np.float32))
    assert worst_reprojection(clip, large) <= 0.01


# --- units, keys, options


def test_units_can_be_read_one_by_one_and_give_the_same_clips(tmp_path, shot):
    for name in ("a", "b b", "ü"):
        raw.write_pointodyssey(tmp_path / name, shot)
    units = registry.list_units("pointodyssey", tmp_path)
    assert units == ["a/train/cab_h_bench_3rd", "b b/train/cab_h_bench_3rd", "ü/train/cab_h_bench_3rd"]
    together = [clip.key for clip in registry.iter_clips("pointodyssey", tmp_path, 9)]
    alone = [clip.key for unit in units for clip in registry.iter_clips("pointodyssey", tmp_path, 9, units=[unit])]
    assert together == alone and len(set(together)) == 3


SMALL: dict[str, Writer] = {
    "bedlam": raw.write_bedlam,
    "generic": raw.write_generic_npz,
    "omniworld": raw.write_omniworld,
    "pointodyssey": raw.write_pointodyssey,
    "rgbd": raw.write_rgbd,
    "spatialvid": raw.write_spatialvid,
    "tartanair": raw.write_tartanair,
    **label_layouts.WRITERS,
}


@pytest.mark.parametrize("source", registry.SOURCES)
def test_a_given_unit_is_read_without_listing_the_dataset_again(tmp_path, shot, source, monkeypatch):
    """A dataset has thousands of units; each is asked for alone."""
    root = SMALL[source](tmp_path, shot)
    listings = []
    module = registry._module(source)

    def counted(folder: Path, list_units: Callable[[Path], list[str]] = module.list_units) -> list[str]:
        listings.append(folder)
        return list_units(folder)

    monkeypatch.setattr(module, "list_units", counted)
    found = registry.list_units(source, root)
    for unit in found:
        registry.iter_clips(source, root, 9, units=[unit])
    assert len(found) == len(listings) == 1
    registry.iter_clips(source, root, 9)
    assert len(listings) == 2
    (unit,) = found
    for wrong in ("nowhere", f"../{tmp_path.name}/{unit}", f"{unit}/..", str(tmp_path / unit)):
        with pytest.raises(ValueError, match=f"{tmp_path.name}: no unit") as caught:
            registry.iter_clips(source, root, 9, units=[wrong])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "unit", "scene"),
    [
        ("tartanair", "office/Easy/P001", "office"),
        ("tartanair", "P001", "P001"),
        ("bedlam", "20221011_1_250_batch01hand/png/seq_000000", "20221011_1_250_batch01hand"),
        ("omniworld", "x/b04f88d1f85a", "x/b04f88d1f85a"),
        ("pointodyssey", "train/cab_h_bench_3rd", "train/cab_h_bench"),
        ("pointodyssey", "train/cab_h_bench_ego2", "train/cab_h_bench"),
        ("pointodyssey", "train/r0_new_f", "train/r0_new"),
    ],
)
def test_units_of_one_place_share_a_scene(source, unit, scene):
    assert registry.scene_of(source, unit) == scene


@pytest.mark.parametrize("source", registry.SOURCES)
def test_a_folder_without_the_dataset_is_refused_in_one_line(tmp_path, source):
    with pytest.raises(ValueError, match=f"{tmp_path.name}: no .* (at or below|directly in) it") as caught:
        registry.iter_clips(source, tmp_path)
    assert "\n" not in str(caught.value)


def test_options_that_do_not_apply_and_unknown_names_are_refused(tmp_path, shot):
    root = raw.write_pointodyssey(tmp_path, shot)
    with pytest.raises(ValueError, match="no source 'kitti'; there are bedlam"):
        registry.iter_clips("kitti", root)
    with pytest.raises(ValueError, match="only spatialvid takes a geometry folder"):
        registry.iter_clips("pointodyssey", root, geometry=root)
    with pytest.raises(ValueError, match="pointodyssey has no confidence"):
        registry.iter_clips("pointodyssey", root, min_confidence=1.0)
    with pytest.raises(ValueError, match="no unit 'train/nowhere'"):
        registry.iter_clips("pointodyssey", root, units=["train/nowhere"])


def test_half_of_the_cameras_is_no_geometry(tmp_path, shot, caplog):
    root = raw.write_generic_folder(tmp_path, shot, pointmaps=True)
    (root / "scene_one" / "intrinsics.npy").unlink()
    assert list(registry.iter_clips("generic", root, 9)) == []
    assert "skipped scene_one: " in caplog.text and "need intrinsics and cam2world" in caplog.text


def test_a_hdri_scene_of_bedlam_is_dropped_with_its_reason(tmp_path, caplog):
    shot = film()
    people = np.where(np.arange(shot.size[1]) < 2, shot.depth, np.inf)
    raw.write_bedlam(tmp_path, Shot(shot.frames, people, shot.intrinsics, shot.cam2world, shot.moving))
    assert list(registry.iter_clips("bedlam", tmp_path, 9)) == []
    assert "a painted background" in caplog.text


def test_omniworld_clips_do_not_cross_a_gap_of_a_split(tmp_path, shot, caplog):
    root = raw.write_omniworld(tmp_path, shot)
    info = root / "b04f88d1f85a" / "split_info.json"
    info.write_text(json.dumps({"split": [[0, 1], [7, 8, 9, 10, 12, 13, 14, 15, 16]]}))
    assert list(registry.iter_clips("omniworld", root, 9)) == []
    assert "no run of 9 frames" in caplog.text


def test_a_playlist_is_no_video(tmp_path, shot):
    """FFmpeg would guess its kind and open the files, or addresses, that it names."""
    raw.save_video(tmp_path / "secret.mp4", shot.frames, 10)
    playlist = tmp_path / "frames.mp4"
    playlist.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    assert read_video(tmp_path / "secret.mp4", [0]).shape == (1, 48, 64, 3)
    with pytest.raises(ValueError, match=r"frames\.mp4: not a video"):
        read_video(playlist, [0])
    with pytest.raises(ValueError, match=r"frames\.mp4: not a video"):
        VideoReader(playlist)


def test_two_spellings_of_one_depth_number_are_one(tmp_path, shot, caplog):
    root = raw.write_bedlam(tmp_path, shot)
    (folder,) = (root / "20221011_1_250_batch01hand" / "depth").iterdir()
    shutil.copy(folder / "seq_000000_0005_depth.exr", folder / "seq_000000_00005_depth.exr")
    assert len(list(registry.iter_clips("bedlam", root, 9))) == 1


def test_images_of_one_instant_are_no_video(tmp_path, shot, caplog):
    root = raw.write_rgbd(tmp_path, shot)
    (sequence,) = root.iterdir()
    names = sorted(path.name for path in (sequence / "rgb").iterdir())
    (sequence / "rgb.txt").write_text("".join(f"1311868164.363181 rgb/{name}\n" for name in names))
    depths = sorted(path.name for path in (sequence / "depth").iterdir())
    stamps = [1311868164.36 + n / 1000 for n in range(9)]
    (sequence / "depth.txt").write_text("".join(f"{s:.6f} depth/{name}\n" for s, name in zip(stamps, depths)))
    (sequence / "groundtruth.txt").write_text("".join(f"{s:.6f} 0 0 0 0 0 0 1\n" for s in stamps))
    assert list(registry.iter_clips("rgbd", root, 9)) == []
    assert "timestamps do not ascend" in caplog.text


def test_rgbd_clips_do_not_cross_a_break_in_time(tmp_path, shot):
    root = raw.write_rgbd(tmp_path, shot)
    (sequence,) = root.iterdir()
    for name in ("rgb.txt", "depth.txt", "groundtruth.txt"):  # the recording paused for a second before its fifth frame
        _, *rows = (sequence / name).read_text().splitlines()
        late = 1311868164.363181 + 3.5 / 30
        moved = [(float(row.split()[0]), row.split(maxsplit=1)[1]) for row in rows]
        (sequence / name).write_text("".join(f"{s + (s > late):.6f} {rest}\n" for s, rest in moved))
    (clip,) = registry.iter_clips("rgbd", root, 5, stride=1)
    np.testing.assert_array_equal(clip.frames, shot.frames[4:])
