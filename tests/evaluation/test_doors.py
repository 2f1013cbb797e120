"""The doors as a stranger uses them: on a seeded tiny base, on stored predictions, on broken input."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.commands import cameras, evaluate
from one4d_pl.config import DLCConfig, SamplerConfig, load_config, to_yaml
from one4d_pl.errors import UserError
from one4d_pl.evaluation import benchmarks, predict
from one4d_pl.evaluation.benchmarks import open_benchmark
from one4d_pl.evaluation.measured import read_metrics
from one4d_pl.evaluation.sweeps import SWEEPS, sparse_indices
from one4d_pl.evaluation.vbench import read_i2v_prompts, video_name
from one4d_pl.geometry.pointmap import depth_to_pointmap
from one4d_pl.inference.long_video import fill_window
from one4d_pl.models.adapters import AdapterCard, save_adapters
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.models.wan import fingerprint
from one4d_pl.scene.predictions import Prediction, read_prediction, write_prediction
from one4d_pl.toy.world import render_clip

REPO = Path(__file__).parents[2]
ONE = "toy_3000000"  # its geometry fits the cube whole


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_base_plain) -> Path:
    """Untrained adapters of another shape than the config's default."""
    folder = tmp_path_factory.mktemp("adapters") / "step-00000007"
    folder.mkdir()
    transformer = One4DTransformer(tiny_base_plain.transformer(), DLCConfig(rank=3, num_links=2), seed=0)
    path = tiny_base_plain.path
    blocks = [int(i) for i in transformer.links]
    sampler = asdict(SamplerConfig())
    card = AdapterCard(path, fingerprint(path), 3, 1.0, blocks, ["video"], 1.0, 7, 9, 32, 48, 16, "", sampler, None, [])
    save_adapters(transformer, folder, card)
    return folder


@pytest.fixture
def arguments(tmp_path, tiny_base_plain, adapters) -> list[str]:
    """A run of the door on one toy scene."""
    base = [f"base.path={tiny_base_plain.path}", f"base.max_text_tokens={tiny_base_plain.max_text_tokens}"]
    size = ["data.num_frames=9", "data.height=48", "data.width=64", "sampler.steps=2"]
    config = load_config([str(REPO / "configs/dlc.yaml")], [*base, "base.tiny=null", "train.precision=32-true", *size])
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    common = ["--ckpt", str(adapters), "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]
    return [*common, "--sequences", ONE]


def test_an_adapter_and_its_ceilings_are_predicted_stored_and_scored(tmp_path, arguments, capsys, refusal):
    assert evaluate.main(arguments) == 0
    table = capsys.readouterr().out
    assert "1 of its 16 sequences" in table and "| ceiling without VAE | all |" in table
    results = {row["row"]: row for row in json.loads((tmp_path / "out/results.json").read_text())}
    assert list(results) == ["model", "ceiling with VAE", "ceiling without VAE"]
    solver = results["ceiling without VAE"]
    assert solver["depth_mean"]["all"]["abs_rel"] < 1e-4 and solver["depth_mean"]["all"]["delta_1"] == 1
    assert solver["camera_mean"]["all_sequences"]["ate"] < 1e-3
    ours = results["model"]
    measured = ours["depth_mean"]["all"] | ours["camera_mean"]["all_sequences"]
    assert read_metrics(tmp_path / "out") == {"toy (one4d)": {k: v for k, v in measured.items() if v is not None}}
    with pytest.raises(UserError, match="no results of a model"):
        read_metrics(tmp_path)
    assert results["model"]["settings"]["step"] == 7 and results["model"]["protocol"]["name"] == "one4d"
    lines = list(csv.DictReader((tmp_path / "out/sequences.csv").open()))
    assert [line["sequence"] for line in lines] == [ONE] * 3
    for name in ("model", "ceiling_with_VAE"):
        for kind in ("depth", "path"):
            with Image.open(tmp_path / "out/pictures" / name / f"{ONE}_{kind}.png") as picture:
                assert min(picture.size) > 100
    stored = tmp_path / "out/predictions/model" / ONE
    before = (stored / "cameras.json").stat().st_mtime_ns
    assert evaluate.main([*arguments, "--rows", "model"]) == 0  # stored: not made again
    assert (stored / "cameras.json").stat().st_mtime_ns == before
    assert "holds predictions of other settings" in refusal(evaluate.main, *arguments, "--seed", "1")
    (stored.parent / "settings.json").write_text("3")
    assert "settings.json: holds no settings; delete" in refusal(evaluate.main, *arguments)
    # what is stored can be scored as anyone's
    anyone = ["--predictions", str(stored.parent), "--sequences", ONE, "--out", str(tmp_path / "again")]
    assert evaluate.main([*anyone, "--no-pictures"]) == 0
    again = json.loads((tmp_path / "again/results.json").read_text())[0]
    assert again["depth_mean"] == results["model"]["depth_mean"]
    assert again["camera_mean"] == results["model"]["camera_mean"]


def test_a_sparsity_sweep_measures_shown_and_hidden_frames_apart(tmp_path, arguments, monkeypatch):
    monkeypatch.setitem(SWEEPS, "sparsity", (0.5,))
    assert evaluate.main([*arguments, "--sweep", "sparsity", "--no-pictures"]) == 0
    (row,) = json.loads((tmp_path / "out/results.json").read_text())
    assert row["row"] == "sparsity 0.5" and set(row["depth_mean"]) == {"all", "observed", "hidden"}
    assert row["settings"]["given"] == {"9": [0, 3, 5, 8]}
    assert read_prediction(tmp_path / "out/predictions/sparsity_0.5" / ONE).given == (0, 3, 5, 8)


def test_windows_cover_a_video_longer_than_the_model(tmp_path, arguments, monkeypatch):
    monkeypatch.setattr(benchmarks, "TOY_SHAPE", (14, 48, 64))
    windows = ["--passes", "windows", "--overlap", "3", "--shape", "letterbox", "--no-pictures", "sampler.steps=1"]
    assert evaluate.main([*arguments, *windows]) == 0
    content = json.loads((tmp_path / "out/predictions/model" / ONE / "cameras.json").read_text())
    assert len(content["frames"]) == 14 and content["report"]["windows"] == [[0, 9, 9], [5, 14, 9]]
    solver = json.loads((tmp_path / "out/results.json").read_text())[2]
    assert solver["depth_mean"]["all"]["abs_rel"] < 1e-3  # joined without loss


def test_a_video_that_is_not_4k_plus_1_is_filled_and_cut(monkeypatch):
    options = predict.PredictOptions(48, 64, 9)
    assert [(w.start, w.stop, w.length) for w in options.windows(110)] == [(0, 110, 113)]
    assert len(options.windows(114)) == 2
    clip = fill_window(torch.arange(6.0)[None], options.windows(6)[0])
    assert clip.tolist() == [[0, 1, 2, 3, 4, 5, 5, 5, 5]]


def test_sparse_frames_are_first_last_and_evenly_between():
    assert sparse_indices(50, 0.05) == [0, 49] and sparse_indices(110, 0.03) == [0, 54, 109]
    assert sparse_indices(50, 0.1) == [0, 12, 24, 37, 49] and sparse_indices(9, 1.0) == list(range(9))
    for share in (0.5, 0.25, 0.1, 0.05, 0.04, 0.03):
        for count in (20, 21, 33, 40, 50, 110):
            kept = sparse_indices(count, share)
            assert (
                len(kept) == len(set(kept)) == max(2, round(share * count)) and kept[0] == 0 and kept[-1] == count - 1
            )
    with pytest.raises(ValueError, match="sparsity: 0"):
        sparse_indices(9, 0.0)


def test_what_is_missing_is_said_in_one_line_with_exit_code_2(tmp_path, arguments, refusal, monkeypatch):
    monkeypatch.setattr(evaluate, "DEMO_ADAPTERS", tmp_path / "demo_adapters")
    monkeypatch.setattr("one4d_pl.config.places.CONFIGS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "the demo adapters are not at" in refusal(evaluate.main)
    assert "demo.yaml: no such config file" in refusal(evaluate.main, "--rows", "ceiling")
    assert "no adapter (card.json)" in refusal(evaluate.main, "--ckpt", str(tmp_path))
    assert "get MPI Sintel" in refusal(evaluate.main, *arguments[:-2], "--bench", "sintel", "--root", str(tmp_path))
    empty = ["--predictions", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "no prediction of toy_3000000" in refusal(evaluate.main, *empty)
    assert "'wrong' is not one of monst3r" in refusal(evaluate.main, *arguments, "--protocol", "wrong")
    assert "--sparsity: 0.0" in refusal(evaluate.main, *arguments, "--sparsity", "0")
    assert "base.path" in refusal(evaluate.main, *arguments, f"base.path={tmp_path / 'nowhere'}")
    bare = [a for a in arguments if a not in ("--config", str(tmp_path / "run.yaml"))]
    assert "--config: name the yaml" in refusal(evaluate.main, *bare)
    assert "clone VBench" in refusal(evaluate.main, *arguments, "--bench", "vbench", "--root", str(tmp_path))


def test_pointmaps_become_cameras_and_depth(tmp_path, capsys):
    clip = render_clip(3_000_001, 5, 24, 32)
    points = depth_to_pointmap(clip.depth, clip.intrinsics, clip.cam2world)
    np.savez(tmp_path / "scene.npz", pointmap=points.numpy() / 3, valid=clip.valid.numpy())
    assert cameras.main([str(tmp_path / "scene.npz"), "--out", str(tmp_path / "out"), "--per-frame-focal"]) == 0
    assert "5 frames" in capsys.readouterr().out
    found = read_prediction(tmp_path / "out")
    torch.testing.assert_close(3 * found.depth[clip.valid], clip.depth[clip.valid], rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found.intrinsics.float(), clip.intrinsics, rtol=2e-3, atol=1e-3)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["solved"] == [True] * 5
    np.save(tmp_path / "scene.npy", points.numpy())
    known = ["--focal", str(float(clip.intrinsics[0, 0, 0]))]
    assert cameras.main([str(tmp_path / "scene.npy"), "--out", str(tmp_path / "known"), *known]) == 0
    fixed = read_prediction(tmp_path / "known").intrinsics
    assert fixed[:, 0, 0].tolist() == pytest.approx([float(known[1])] * 5)
    lens = ["--principal-point", "17,11.5", "--aspect", "1.25", "--no-per-frame-focal"]
    assert cameras.main([str(tmp_path / "scene.npy"), "--out", str(tmp_path / "lens"), *lens]) == 0
    printed = capsys.readouterr().out
    assert "fy / fx 1.2500, principal point 17.00, 11.50" in printed and "points contradict" in printed
    fixed = read_prediction(tmp_path / "lens").intrinsics
    assert fixed[:, :2, 2].tolist() == [[17, 11.5]] * 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (np.zeros((2, 4, 4)), "need floating point [T, H, W, 3]"),
        (np.zeros((2, 4, 4, 3), int), "need floating point"),
        (np.array([{}], dtype=object), "allow_pickle"),
        ({"points": np.zeros((2, 4, 4, 3))}, "no array `pointmap`, it has points"),
        ({"pointmap": np.zeros((2, 4, 4, 3)), "valid": np.ones((2, 4, 5), bool)}, "valid is bool [2, 4, 5]"),
        ({"pointmap": np.zeros((2, 4, 4, 3)), "valid": -np.ones((2, 4, 4))}, "negative or nan"),
    ],
)
def test_the_cameras_door_names_what_is_wrong(tmp_path, refusal, content, message):
    path = tmp_path / ("scene.npz" if isinstance(content, dict) else "scene.npy")
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    assert message in refusal(cameras.main, str(path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--principal-point", "17"], "'17', need two numbers X,Y or solve"),
        (["--aspect", "wide"], "'wide', need a number or solve"),
    ],
)
def test_the_cameras_door_names_a_lens_that_is_none(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        cameras.main([str(tmp_path / "scene.npy"), "--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err


def test_a_constant_pointmap_gets_a_flagged_answer_and_no_error(tmp_path, capsys):
    np.save(tmp_path / "scene.npy", np.ones((2, 8, 8, 3)))
    assert cameras.main([str(tmp_path / "scene.npy"), "--out", str(tmp_path / "out")]) == 0
    assert "unusual or degenerate: no geometry" in capsys.readouterr().out
    assert "no geometry" in read_prediction(tmp_path / "out").flags


def test_vbench_gets_its_names_its_folder_and_a_true_frame_rate(tmp_path, arguments):
    root = tmp_path / "vbench2_beta_i2v"
    (root / "data/crop/7-4").mkdir(parents=True)
    info = [
        {"prompt_en": "a dog runs", "image_name": "dog.jpg", "dimension": ["i2v_subject"]},
        {"prompt_en": "a pan left", "image_name": "pan.jpg", "dimension": ["camera_motion"]},
    ]
    (root / "vbench2_i2v_full_info.json").write_text(json.dumps(info))
    Image.new("RGB", (70, 40), (200, 10, 10)).save(root / "data/crop/7-4/dog.jpg")
    vbench = ["--bench", "vbench", "--root", str(root), "--ratio", "7-4", "--fps", "12", "sampler.steps=1"]
    assert evaluate.main([*arguments, *vbench]) == 0
    videos = sorted(path.name for path in (tmp_path / "out/videos").iterdir())
    assert videos == [f"a dog runs-{index}.mp4" for index in range(5)]
    with av.open(str(tmp_path / "out/videos/a dog runs-0.mp4")) as container:
        assert container.streams.video[0].average_rate == 12
        assert len(list(container.decode(video=0))) == 9
    with pytest.raises(ValueError, match="need vbench2_i2v_full_info"):
        read_i2v_prompts({"a": 1}, root, ("i2v_subject",))
    with pytest.raises(ValueError, match="for a file name"):
        video_name("a/b", 0)


def test_a_stored_truth_scores_full_marks_through_the_door(tmp_path):
    (sequence,) = open_benchmark("toy", None, (ONE,))
    intrinsics, cam2world = sequence.read_cameras()
    depth = sequence.read_depth()
    write_prediction(tmp_path / "p" / ONE, Prediction(depth.where(depth.isfinite(), 99.0), cam2world, intrinsics), {})
    arguments = ["--predictions", str(tmp_path / "p"), "--sequences", ONE, "--out", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 0
    (row,) = json.loads((tmp_path / "out/results.json").read_text())
    assert row["depth_mean"]["all"]["abs_rel"] < 1e-12 and row["camera_mean"]["protocol"]["ate"] < 1e-12
