"""The generate door: every kind of input to a scene on disk that opens again, and 500 bad ones refused in one line."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.commands import cameras, generate
from one4d_pl.errors import UserError
from one4d_pl.inference.pipeline import One4DPipeline, RequestError
from one4d_pl.scene.predictions import read_prediction
from one4d_pl.scene.scene import open_scene, save_scene

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Pictures in three formats, six as a folder, a video of 13 frames and one of a single frame."""
    folder = tmp_path_factory.mktemp("files")
    for suffix in ("png", "jpg", "webp"):
        Image.fromarray(PICTURE).save(folder / f"a.{suffix}")
    (folder / "frames").mkdir()
    for i in range(6):
        Image.fromarray(np.roll(PICTURE, i, axis=1)).save(folder / f"frames/{i:03d}.jpg")
    for name, count in (("v.mp4", 13), ("one.mp4", 1)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 60, 40, "yuv420p"
            for i in range(count):
                frame = av.VideoFrame.from_ndarray(np.roll(PICTURE, i, axis=1), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return folder


def run(*arguments: object) -> int:
    return generate.main([*map(str, arguments), "--steps", "1", "--guidance", "1"])


@pytest.mark.parametrize(
    ("task", "options", "num_frames", "given"),
    [
        ("text", ["--prompt", "a ball"], 9, []),
        ("image", ["--image", "a.jpg", "--num-frames", "6"], 6, [0]),
        ("sparse", ["--frames", "a.png@0", "a.webp@8"], 9, [0, 8]),
        ("video", ["--video", "v.mp4"], 13, list(range(13))),
        ("video", ["--video", "frames"], 6, list(range(6))),
    ],
)
def test_every_task_leaves_a_scene_that_opens_again(files, tmp_path, task, options, num_frames, given):
    out = tmp_path / "scene"
    named = [str(files / word) if (files / word.split("@")[0]).exists() else word for word in options]
    assert run(*named, "--out", out) == 0
    scene = open_scene(out)
    assert scene.num_frames == num_frames and list(scene.given) == given and scene.made["task"] == task
    assert {"rgb.mp4", "depth.mp4", "pointmap.npz", "cameras.json", "frames", "panel.png"} <= {
        p.name for p in out.iterdir()
    }
    assert scene.fps == (10 if "v.mp4" in options else 16)
    with av.open(str(out / "rgb.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == num_frames
    prediction = read_prediction(out)  # what `evaluate --predictions` reads
    assert torch.equal(prediction.cam2world, scene.cam2world) and torch.equal(prediction.depth, scene.depth)
    assert cameras.main([str(out), "--out", str(tmp_path / "cameras")]) == 0
    assert len(read_prediction(tmp_path / "cameras").cam2world) == num_frames
    again = tmp_path / "again"
    save_scene(again, scene)
    for name in ("scene.json", "cameras.json", "depth.npy", "frames/000000.png"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    assert torch.equal(open_scene(again).pointmap, scene.pointmap)
    seed = run(*named, "--out", tmp_path / "other", "--seed", "1")
    assert seed == 0 and not torch.equal(open_scene(tmp_path / "other").pointmap, scene.pointmap)


def test_memory_that_holds_everything_changes_nothing_and_too_little_is_one_line(files, tmp_path, capsys):
    common = ["--image", str(files / "a.png"), "--steps", "2", "--guidance", "3"]
    assert generate.main([*common, "--out", str(tmp_path / "a")]) == 0
    assert generate.main([*common, "--memory", "24", "--out", str(tmp_path / "b")]) == 0
    a, b = open_scene(tmp_path / "a"), open_scene(tmp_path / "b")
    assert torch.equal(a.pointmap, b.pointmap) and a.made == b.made
    for options, words in (
        (["--memory", "0.3"], "memory: 0.3 GiB; 9 frames of 48x64 need "),
        (["--memory", "0"], "--memory: 0.0, need GiB above 0"),
        (["--memory", "24", "--compile"], "--compile: not with --memory"),
    ):
        capsys.readouterr()
        assert generate.main([*common, *options, "--out", str(tmp_path / "c")]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert words in line and not (tmp_path / "c").exists()


def truncations(content: bytes, count: int) -> list[bytes]:
    """Beginnings of a file, the longest without its last tenth."""
    return [content[: len(content) * 9 * i // (10 * count)] for i in range(count)]


def test_500_bad_inputs_end_in_one_line_and_exit_code_2(files, tmp_path, capsys, monkeypatch):
    def no_model(args):
        raise AssertionError("a model was opened for input that is bad")

    bad: list[list[object]] = []
    for name, count in (("a.png", 160), ("a.jpg", 120), ("a.webp", 100), ("v.mp4", 60)):
        for i, content in enumerate(truncations((files / name).read_bytes(), count)):
            path = tmp_path / f"{i}-{name}"
            path.write_bytes(content)
            bad.append(["--video" if name == "v.mp4" else "--image", path])
    good = files / "a.png"
    narrow, real, folder = tmp_path / "narrow.png", tmp_path / "real.tiff", tmp_path / "folder"
    Image.new("RGB", (900, 10)).save(narrow)
    Image.new("F", (10, 10)).save(real)
    folder.mkdir()
    (folder / "other").touch()
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([object()], dtype=object))
    (tmp_path / "pickle.npz").write_bytes(buffer.getvalue())
    bad += [["--image", path] for path in (narrow, real, folder, tmp_path / "none.png", tmp_path / "pickle.npz")]
    bad += [["--video", path] for path in (good.with_name("none.mp4"), folder, tmp_path / "pickle.npz")]
    bad += [["--frames", word] for word in (str(good), f"{good}@", f"{good}@-1", f"{good}@x", "@0", f"{good}@1e3", "@")]
    bad += [["--frames", f"{good}@{n}"] for n in (10_000, 10**9, 10**30)]
    bad += [["--frames", f"{good}@0", f"{good}@0"], ["--frames", f"{good}@00", f"{good}@0"]]
    bad += [["--prompt", text] for text in ("", "  ", "\n", "\udcff")]
    bad += [["--image", good, "--video", files / "v.mp4"], ["--image", good, "--frames", f"{good}@0"]]
    bad += [["--image", good, "--num-frames", n] for n in (0, -1, 10_001, 10**12)]
    bad += [["--image", good, "--size", size] for size in ("48", "48x", "x48", "0x64", "48x64x3", "48x-64", "9999x64")]
    bad += [["--image", good, "--size", size] for size in ("4.8x64", "48*64", "48 x", "big", "", "x", "1e2x64")]
    bad += [["--image", good, "--fps", fps] for fps in ("nan", "inf", "0", "-1", "1e9")]
    bad += [["--image", good, "--steps", steps] for steps in (0, -5, 1001)]
    bad += [["--image", good, "--seed", seed] for seed in (-1, 2**63, 2**80)]
    bad += [
        ["--image", good, "--out", folder],
        ["--image", good, "--out", good],
        ["--image", good, "--out", good / "x"],
    ]
    bad += [["--image", good, "--out", Path("/proc/none")]]
    bad += [["--video", files / "v.mp4", "--fps", fps] for fps in ("nan", "0")]
    assert len(bad) >= 500
    monkeypatch.setattr(generate, "open_pipeline", no_model)
    refused(bad, tmp_path, capsys)
    monkeypatch.undo()
    opened: list[list[object]] = [
        ["--video", files / "one.mp4"],
        ["--video", files / "v.mp4", "--num-frames", 14],
        ["--frames", f"{good}@1"],
        ["--frames", f"{good}@0", f"{good}@7", "--num-frames", 5],
        ["--image", good, "--size", "50x64"],
        ["--image", good, "--guidance", "nan"],
        ["--image", good, "--guidance", "-1"],
        ["--image", good, "--adapters", folder],
        ["--image", good, "--adapters", tmp_path / "none"],
        ["--image", good, "--base", tmp_path / "none"],
        ["--image", good, "--base", folder],
        ["--image", good, "--device", "cuda:99"],
        ["--image", good, "--device", "gpu"],
        ["--image", good, "--device", "meta"],
    ]
    refused(opened, tmp_path, capsys)


def refused(cases: list[list[object]], tmp_path: Path, capsys) -> None:
    """Exit code 2, one line on stderr that begins with `error:`, and no folder left."""
    before = sorted(tmp_path.rglob("*"))
    for options in cases:
        out = [] if "--out" in options else ["--out", tmp_path / "scene"]
        code = generate.main([*map(str, options), *map(str, out)])
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert code == 2 and len(said) == 1, options
        assert len(said[0]) < 500, said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_scene_folder_that_is_not_whole_is_refused_by_name(files, tmp_path):
    assert run("--image", files / "a.png", "--out", tmp_path / "s") == 0
    scene = tmp_path / "s"

    def broken(name: str, content: bytes | None, words: str) -> None:
        path, kept = scene / name, (scene / name).read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            open_scene(scene)
        assert "\n" not in str(caught.value)
        path.write_bytes(kept)

    about = json.loads((scene / "scene.json").read_text())
    broken("scene.json", None, "no scene.json")
    broken("scene.json", b"[]", "format")
    broken("scene.json", json.dumps(about | {"fps": 0}).encode(), "scene.json: ")
    broken("pointmap.npz", None, "pointmap.npz")
    broken("pointmap.npz", b"PK", "pointmap.npz")
    buffer = io.BytesIO()
    np.savez(buffer, pointmap=np.array([None], dtype=object), valid=np.zeros(1, bool))
    broken("pointmap.npz", buffer.getvalue(), "pointmap.npz")  # a pickle is not opened
    broken("frames/000000.png", b"", "000000.png")
    broken("frames/000003.png", None, "frames")
    broken("depth.npy", None, "depth.npy")
    broken("cameras.json", b"{}", "cameras.json")
    assert open_scene(scene).num_frames == 9


def test_the_pipeline_is_saved_and_opened(tmp_path):
    pipeline = One4DPipeline.from_pretrained()
    pipeline.save_pretrained(tmp_path / "saved")
    again = One4DPipeline.from_pretrained("embedded", tmp_path / "saved")
    stored, loaded = pipeline.transformer.state_dict(), again.transformer.state_dict()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    assert again.card == pipeline.card and again.config == pipeline.config and again.shift == pipeline.shift
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "library_name: one4d_pl" in text and "CC0-1.0" in text
    with pytest.raises(RequestError, match="exists"):
        pipeline.save_pretrained(tmp_path / "saved")
