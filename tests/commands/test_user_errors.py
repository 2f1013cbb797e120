"""Files, folders and disks that cannot be used: one line and exit code 2 of every command, and nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep import check_shards, encode_latents, stats, write_shards
from data_prep.sources import decoding
from experiments.nano import __main__ as nano_main
from experiments.tiny_wan import build_vae
from one4d_pl import fit
from one4d_pl.commands import cameras, demo, evaluate, export, generate, preflight, view
from one4d_pl.commands.command import USER_ERROR
from one4d_pl.config import DEMO_ADAPTERS, EMBEDDED_BASE, base_folder
from one4d_pl.data.rgbd_folder import list_files, read_trajectory
from one4d_pl.errors import UserError
from one4d_pl.evaluation.formats import TAG, read_cam, read_dpt
from one4d_pl.files import read_json
from one4d_pl.scene.media import load_image, open_video
from one4d_pl.scene.scene import Scene, open_scene, save_scene
from tests.own_process import in_own_process

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 19000000\n"
ROWS = [f"{10 + i / 30:.5f} {i} 0 0 0 0 0 1" for i in range(5)]
TOY = ["--source", "toy", "--height", "48", "--width", "64", "--num-frames", "9", "--count", "2"]


@pytest.fixture
def scene() -> Scene:
    """Three frames of a wall."""
    depth = torch.full((3, 16, 32), 2.0)
    points = torch.stack([*torch.meshgrid(torch.arange(16.0), torch.arange(32.0), indexing="ij"), depth[0]], -1)
    intrinsics = torch.tensor([[20.0, 0, 16], [0, 20, 8], [0, 0, 1]]).double().expand(3, 3, 3)
    cam2world = torch.eye(4).double().expand(3, 4, 4)
    frames = torch.zeros(3, 16, 32, 3, dtype=torch.uint8)
    return Scene(frames, points.expand(3, -1, -1, -1).clone(), depth > 0, depth, intrinsics, cam2world, 8.0)


# ---- text of benchmarks


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("\n".join(ROWS).encode(), None),
        ("\r\n".join(ROWS).encode(), None),
        ("\n".join(["# timestamp tx ty tz qx qy qz qw", *ROWS]).encode("utf-8-sig"), None),
        ("\n".join(ROWS).replace(" 2 ", " nan ").encode(), "line 3: 'nan' is no finite number"),
        ("\n".join(ROWS).replace(" ", ",").encode(), "line 1: 1 columns, need 8"),
        ("\n".join(ROWS).encode("utf-16"), "UTF-16"),
        ("\n".join(ROWS)[:-9].encode(), "line 5: 3 columns"),
        ("\n".join(ROWS).replace("0 1", "0 0").encode(), "norm"),
        (b"\xff\xfe\x00broken", "UTF-16"),
        (b"", "no camera"),
        (POINTER, "columns"),
    ],
)
def test_a_trajectory_is_read_or_its_fault_is_one_line(tmp_path, content, complaint):
    path = tmp_path / "groundtruth.txt"
    path.write_bytes(content)
    if complaint is None:
        assert read_trajectory(path).cam2world[:, 0, 3].tolist() == [0, 1, 2, 3, 4]
        return
    with pytest.raises(UserError) as raised:
        read_trajectory(path)
    assert complaint in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("hidden", ["._10.00000.png", ".DS_Store", ".10.5.png"])
def test_files_that_a_system_hides_are_no_images(tmp_path, hidden):
    (tmp_path / "rgb").mkdir()
    for name in ("10.0.png", "9.5.png", hidden):
        (tmp_path / "rgb" / name).write_bytes(b"\0\5\x16\7")
    assert [file.timestamp for file in list_files(tmp_path, "rgb")] == [9.5, 10.0]
    (tmp_path / "rgb" / "Copy of 10.0.png").touch()
    with pytest.raises(UserError, match=r"Copy of 10\.0\.png: its name: .* is no finite number"):
        list_files(tmp_path, "rgb")


@pytest.mark.parametrize("cut", [0, 3, 11, 100])
def test_sintels_files_that_are_cut_or_hold_no_numbers_are_named(tmp_path, cut):
    dpt, cam = tmp_path / "a.dpt", tmp_path / "a.cam"
    dpt.write_bytes((TAG.tobytes() + struct.pack("<ii", 8, 8) + bytes(256))[:cut])
    cam.write_bytes(TAG.tobytes() + struct.pack("<d", float("nan")) * 21 if cut == 100 else TAG.tobytes()[:cut])
    for read, path in ((read_dpt, dpt), (read_cam, cam)):
        with pytest.raises(UserError, match=str(path)):
            read(path)


def test_evaluate_says_which_file_of_a_benchmark_is_damaged(tmp_path, refusal):
    folder = tmp_path / "rgbd_dataset_freiburg3_walking_xyz"
    (folder / "rgb").mkdir(parents=True)
    (folder / "depth").mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8)).save(folder / "rgb" / f"{10 + i / 30:.5f}.png")
    for content in ("\n".join(ROWS).replace(" 2 ", " nan ").encode(), b"a,b", "\n".join(ROWS).encode("utf-16")):
        (folder / "groundtruth.txt").write_bytes(content)
        arguments = ["--bench", "tum_30", "--root", tmp_path, "--sequences", "walking_xyz", "--predictions", tmp_path]
        assert "groundtruth.txt" in refusal(evaluate.main, *arguments, "--out", tmp_path / "out")


# ---- git-lfs pointers


def test_every_reader_of_large_files_knows_a_pointer(tmp_path):
    readers = {
        "a.png": load_image, "a.mp4": lambda path: open_video(path, None, 16), "b.png": decoding.read_image,
        "c.npy": decoding.read_npy, "d.npz": lambda path: decoding.read_npz(path, ["x"]),
        "e.mp4": lambda path: decoding.read_video(path, [0]), "f.json": read_json,
        "g.npz": cameras.read_pointmaps,
    }  # fmt: skip
    for name, read in readers.items():
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(ValueError, match="git lfs pull") as raised:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_base_of_pointers_is_refused_by_training_and_preflight(tmp_path, capsys, part):
    shutil.copytree(base_folder(EMBEDDED_BASE), tmp_path / "base")
    for file in (tmp_path / "base" / part).glob("*.safetensors"):
        file.write_bytes(POINTER)
    toy = f"data.toy={{root: {tmp_path}/toy, train_synthetic: 1, train_real: 0, val: 1, seed: 0}}"
    sources = [
        f"data.sources=[{{path: {tmp_path}/toy/train_synthetic}}]",
        f"data.val_sources=[{{path: {tmp_path}/toy/val}}]",
    ]
    arguments = ["--config", "configs/dlc.yaml", f"base.path={tmp_path}/base", f"run_dir={tmp_path}/run", toy, *sources]
    for command in (fit.main, preflight.main):
        capsys.readouterr()
        assert command(arguments) == USER_ERROR
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and "133 bytes: cut short, or no safetensors file (a git-lfs pointer" in said[0]


@pytest.mark.parametrize("file", ["rgb/adapter_model.safetensors", "links.safetensors", "card.json"])
def test_an_adapter_of_pointers_is_named_and_not_the_output(tmp_path, refusal, file):
    shutil.copytree(DEMO_ADAPTERS, tmp_path / "adapters")
    (tmp_path / "adapters" / file).write_bytes(POINTER)
    said = refusal(export.main, tmp_path / "adapters", "--out", tmp_path / "out")
    assert str(tmp_path / "adapters" / file) in said and "git lfs pull" in said and "--out" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


@pytest.mark.parametrize("file", ["shard-000000.tar", "manifest.json"])
def test_shards_of_pointers_are_named(tmp_path, capsys, file):
    assert write_shards.main([*TOY, "--out", str(tmp_path / "set")]) == 0
    (tmp_path / "set" / file).write_bytes(POINTER)
    capsys.readouterr()
    assert stats.main([str(tmp_path / "set"), "--out", str(tmp_path / "out")]) == USER_ERROR
    assert "error: " in (said := capsys.readouterr().err) and "Traceback" not in said
    if file == "manifest.json":
        assert "git lfs pull" in said


# ---- what cannot be written


def test_outputs_that_cannot_be_are_refused_by_every_command(tmp_path, refusal, scene):
    (tmp_path / "file").touch()
    save_scene(tmp_path / "scene", scene)
    assert write_shards.main([*TOY, "--out", str(tmp_path / "set")]) == 0
    shards = tmp_path / "set"
    commands = {
        generate.main: ("--prompt", "a", "--out"), cameras.main: (tmp_path / "scene", "--out"),
        view.main: (tmp_path / "scene", "--html"), export.main: (tmp_path / "scene", "--out"),
        evaluate.main: ("--rows", "ceiling", "--out"), demo.main: ("--out",), nano_main.main: ("--out",),
        build_vae.main: ("--minutes", "1", "--out"), stats.main: (shards, "--out"),
        check_shards.main: (shards, "--report"), write_shards.main: (*TOY, "--out"),
        encode_latents.main: ("--config", "configs/dlc.yaml", "--raw", shards, "--out"),
    }  # fmt: skip
    for command, arguments in commands.items():
        for place in ("file/x", "file/x/y", "n" * 300):
            end = f"{place}/scene.html" if command is view.main else place
            assert "cannot write" in refusal(command, *arguments, tmp_path / end), command.name
    for command in (fit.main, preflight.main):
        said = refusal(command, "--config", "configs/dlc.yaml", f"run_dir={tmp_path}/file/run")
        assert said.startswith("error: run_dir: cannot write")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "scene", "set"]


@pytest.mark.parametrize("way", ["a file in its place", "a link to nowhere", "read-only"])
def test_shards_beside_which_nothing_can_be_written_are_refused_with_what_would_work(tmp_path, capsys, way):
    folder = tmp_path / "set"
    assert write_shards.main([*TOY, "--out", str(folder)]) == 0
    if way == "a file in its place":
        (folder / "encoded").touch()
    elif way == "a link to nowhere":
        (folder / "encoded").symlink_to("/proc/nowhere/x")
    elif os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    else:
        folder.chmod(0o555)
    sources = [f"data.sources=[{{path: {folder}}}]", f"data.val_sources=[{{path: {folder}}}]", "data.toy=null"]
    for command in (fit.main, preflight.main):
        capsys.readouterr()
        assert command(["--config", "configs/dlc.yaml", f"run_dir={tmp_path}/run", *sources]) == USER_ERROR
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert "data.cache_latents: cannot write" in line and "set data.cache_latents=false" in line
    folder.chmod(0o755)


# ---- a disk that is full


def test_a_full_disk_leaves_the_old_scene_and_the_next_one_takes_its_place(tmp_path, scene):
    save_scene(tmp_path / "scene", scene)
    in_own_process(_save_without_room, tmp_path / "scene", scene)
    assert len(open_scene(tmp_path / "scene").frames) == 3
    assert not list(tmp_path.rglob("*.tmp"))
    save_scene(tmp_path / "scene", Scene(**{**vars(scene), "prompt": "new"}))
    assert open_scene(tmp_path / "scene").prompt == "new"


def _save_without_room(folder: Path, scene: Scene) -> None:
    """A limit on the size of files fails as a full disk does: in the middle of a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (10, 600, 3000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save_scene(folder, Scene(**{**vars(scene), "prompt": "new"}))
        except UserError as error:
            assert str(folder) in str(error)
        else:
            raise AssertionError(limit)


def test_a_scene_folder_that_was_cut_short_may_be_written_again_and_a_persons_own_may_not(tmp_path, refusal, scene):
    for missing in (["scene.json"], ["scene.json", "cameras.json", "depth.npy"]):
        save_scene(tmp_path / "cut", scene)
        for name in missing:
            (tmp_path / "cut" / name).unlink()
        assert "no scene.json" in refusal(view.main, tmp_path / "cut")
        save_scene(tmp_path / "cut", scene)
        assert len(open_scene(tmp_path / "cut").frames) == 3
    for own in ("frames/000000.png", "notes.txt", "rgb.mp4"):
        folder = tmp_path / own.partition("/")[0].replace(".", "_")
        (folder / own).parent.mkdir(parents=True)
        (folder / own).touch()
        assert "holds other things" in refusal(generate.main, "--prompt", "a", "--out", folder)
        assert (folder / own).exists()
