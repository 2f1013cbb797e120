"""Every shell line of README and docs is run: pasted here with few steps and small files, or by the test in ELSEWHERE.

A page's lines run in their order, in a folder that holds what the page supposes: a video, a run, a benchmark's files.
NOWHERE says of the few others why.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.units import split_units
from one4d_pl.config import DEMO_ADAPTERS, load_config, to_yaml
from one4d_pl.scene.predictions import Prediction, write_prediction
from tests.conftest import REPO, build_tiny_base, write_toy_shards
from tests.data_prep.raw_layouts import film, save_video, write_tartanair
from tests.data_prep.test_sources import TARTANAIR_CAMERA
from tests.evaluation.test_benchmarks import make_folder, make_sintel
from tests.slurm_lab.lab import Lab, what_is_missing
from tests.test_docs import PAGES, command, commands, name
from tests.test_own_videos import own_video_lines

CI = ".ci/run"
NANO = "tests/experiments/test_nano.py::test_runs_of_their_own_processes_and_a_sampling_without_adapters"
SUBMITS = "tests/test_slurm_scripts.py::test_outside_a_job_the_script_submits_itself_with_the_sites_settings"
VIEWER = "tests/scene/test_viewer.py::test_the_door_serves_until_it_is_interrupted"
WHEEL = "tests/test_wheel.py::test_an_installed_one4d_shows_the_quick_demo_in_any_folder"

# how a line begins -> the test that runs it, or the script
ELSEWHERE = {
    "make setup": CI,
    "make lint types": CI,
    "make test": CI,
    CI: CI,
    "pytest -k oracle": CI,
    "make slurm-setup": CI,
    "make slurm-test": "tests/slurm_lab/proof.py",
    "slurm/train_8node.sh": SUBMITS,
    "NODES=4": SUBMITS,
    "make nano": NANO,
    "experiments.nano": NANO,
    "experiments.nano --only": "tests/experiments/test_nano.py::test_every_experiment_runs_and_is_reported",
    "experiments.nano --report-only":
        "tests/experiments/test_shipped_report.py::test_the_shipped_report_is_what_its_results_say",
    "make bench": "tests/models/test_benchmark.py::test_the_coupling_benchmark_runs",
    "make gpu-proof": "tests/experiments/test_gpu_proof.py::test_it_runs_every_part_and_leaves_its_report",
    "experiments.bench_gpu --tiny":
        "tests/experiments/test_bench_gpu.py::test_it_needs_torch_diffusers_and_this_package_alone",
    "one4d fit --config configs/dlc.yaml train.strategy=deepspeed":
        "tests/training/test_zero.py::test_every_strategy_trains_what_one_process_trains",
    "one4d rehearse": "tests/rehearsal/test_rehearsal.py::test_the_door_tells_what_it_saw",
    "tests.postopt.benchmark_gradient_fit":
        "tests/postopt/test_benchmark.py::test_never_less_accurate_than_a_gradient_fit_and_faster",
    "tests.postopt.camera_cases":
        "tests/postopt/test_camera_cases.py::test_every_case_is_within_its_stated_error_and_says_what_is_unusual",
    "one4d app": "tests/commands/test_app.py::test_a_click_gives_a_scene_of_every_task",
    "one4d view": VIEWER,
    "one4d view scenes/video --html":
        "tests/scene/test_viewer.py::test_the_file_takes_the_finest_stride_that_fits_and_says_it",
    "one4d generate --prompt a red ball rolls over grass --out scenes/hub":
        "tests/inference/test_hub.py::test_the_command_reads_the_clients_own_variables",
    "one4d fetch-weights": "tests/test_fetch_weights.py::test_run_fetches_what_is_opened_and_verifies_it",
    "pip": WHEEL,
    "one4d demo --quick": WHEEL,
}  # fmt: skip
# how a line begins -> why no test runs it
NOWHERE = {
    "docker": "needs a registry of images",
    "apptainer": "needs a registry of images",
    "CONTAINER=": "needs a registry of images",
    "uv": "uv is not among the tests' programs",
    "one4d app --adapters": "names a CUDA device",
    "experiments.bench_gpu": "needs a GPU",
}

# minutes even so: `make test-long` runs them
LONG = {
    "make demo",
    "make eval",
    "one4d fit --config configs/dlc.yaml train.strategy=ddp train.devices=2 train.micro_batch_size=4 run_dir=runs/ddp",
}

# What makes a line quick. Clips of a scale made for GPUs are those of the small shards.
SMALL_RAW = ["--num-frames", "17", "--height", "32", "--width", "48"]
FEW_STEPS = [
    "train.max_steps=1", "train.global_batch_size=8", "train.micro_batch_size=4", "train.save_every=1", "val.clips=2",
    "eval.every=0", "eval.video_every=0", "optim.cooldown_steps=0", "data.num_workers=0", "train.compile=false",
]  # fmt: skip
SMALL_TOYS = ["data.toy.train_synthetic=6", "data.toy.train_real=2", "data.toy.val=4"]
ON_A_CPU = [
    "train.accelerator=auto", "train.devices=1", "data.num_frames=17", "data.height=32", "data.width=48", "dlc.rank=4",
]  # fmt: skip
LARGE = "configs/scale/wan_"
SEQUENCES = {"toy": "toy_3000000", "sintel": "ambush_6", "bonn": "crowd2", "tasks": ""}
PROCESS_TIMEOUT_S = 240


# --- every line has a place


def shortened(words: list[str]) -> list[str]:
    """Return the words with the program by its shortest name: `one4d fit` for `.venv/bin/python -m one4d_pl.fit`."""
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "python":
        program, rest = rest[1], rest[2:]
    return [*{"one4d_pl": ["one4d"], "one4d_pl.fit": ["one4d", "fit"]}.get(program, [program]), *rest]


def plain(words: list[str]) -> str:
    return " ".join(shortened(words))


def beginning(table: dict[str, str], words: list[str]) -> str | None:
    """Return the longest key of the table that the line begins with."""
    return max((key for key in table if plain(words).startswith(key)), key=len, default=None)


def lines_here() -> dict[str, list[list[str]]]:
    """List the lines that this file runs: page -> lines. One that stands on two pages is run for the first."""
    found: dict[str, list[list[str]]] = {}
    seen = {plain(words) for words in own_video_lines()}
    for page in PAGES:
        for words in commands(page):
            if plain(words) not in seen and not beginning(ELSEWHERE | NOWHERE, words):
                found.setdefault(name(page), []).append(words)
            seen.add(plain(words))
    return found


def test_no_place_is_stale() -> None:
    lines = [words for page in PAGES for words in commands(page)]
    used = {beginning(ELSEWHERE | NOWHERE, words) for words in lines}
    assert not (ELSEWHERE | NOWHERE).keys() - used
    assert {plain(words) for words in lines} >= LONG
    for place in ELSEWHERE.values():
        file, _, test = place.partition("::")
        assert f"def {test}(" in (REPO / file).read_text() if test else (REPO / file).is_file(), place
    assert lines_here().keys() == PREPARE.keys()


# --- what a page supposes


def a_video(path: str) -> None:
    save_video(Path(path), film().frames, 12)


def a_run(folder: str) -> None:
    """A run of the tiny scale that stopped at step 5500, with the shipped adapters."""
    shutil.copytree(DEMO_ADAPTERS, f"{folder}/checkpoints/step-00005500")
    Path(folder, "config.yaml").write_text(to_yaml(load_config(["configs/demo.yaml"], [f"run_dir={folder}"])))


def a_training() -> None:
    run(["one4d", "fit", "--config", "configs/dlc.yaml"])


def sintel() -> None:
    make_sintel(Path("data/sintel"), "ambush_6", 20)


def predictions(folder: str, frames: int, size: tuple[int, int]) -> None:
    depth = torch.rand(frames, *size, generator=torch.Generator().manual_seed(0)) + 1
    cameras = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    cameras[:, 0, 3] = torch.arange(frames)
    write_prediction(Path(folder), Prediction(depth, cameras), {})


def bonn() -> None:
    times = [200 + 0.03 * k for k in range(150)]
    make_folder(Path("data/bonn"), "rgbd_bonn_crowd2", times, times, times)
    predictions("geo4d_out/crowd2", 110, (2, 4))


def pointmaps() -> None:
    np.savez("pointmaps.npz", pointmap=film_points())


def film_points() -> np.ndarray:  # [T, H, W, 3], of the world
    shot = film()
    pixels = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in shot.size[::-1])), axis=-1)
    rays = (pixels - shot.intrinsics[:, None, None, :2, 2]) / shot.intrinsics[:, None, None, [0, 1], [0, 1]]
    points = np.concatenate([rays, np.ones_like(rays[..., :1])], axis=-1) * shot.depth[..., None]
    turned = np.einsum("tij,thwj->thwi", shot.cam2world[:, :3, :3], points)
    return (turned + shot.cam2world[:, None, None, :3, 3]).astype(np.float32)


def bases() -> None:
    for model in ("14B", "1.3B"):
        build_tiny_base(Path(f"weights/Wan2.1-Fun-V1.1-{model}-InP"), image_tokens=True)


def shards(*folders: str) -> None:
    toys = write_toy_shards(Path("toys"))
    for folder in folders:
        place = Path("shards", folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to((toys / ("val" if place.name == "val" else "train_synthetic")).resolve())


def one4d_mix() -> None:
    bases()
    sources = ("omniworld_game", "bedlam", "pointodyssey", "tartanair", "spatialvid")
    shards(*(f"{source}/train" for source in sources), "tartanair/val")


def tartanair() -> None:
    """One scene for each split."""
    shot = film(17, 96, 128, TARTANAIR_CAMERA, enlarge=5)
    names = [f"place{number}/Easy/P000" for number in range(400)]
    for split in ("train", "val"):
        (unit, *_) = split_units("tartanair", names, split, 0.05)  # the share that write_shards takes by itself
        write_tartanair(Path("made"), shot)
        Path("RAW", unit).parent.mkdir(parents=True)
        shutil.move("made/seaside/Easy/P000", Path("RAW", unit))


PREPARE: dict[str, list[Callable[[], None]]] = {
    "README.md": [lambda: a_video("my_video.mp4"), lambda: a_run("runs/x"), sintel, one4d_mix,
                  lambda: predictions("monst3r_out/ambush_6", 20, (4, 6))],
    "docs/data.md": [tartanair, bases, lambda: shards("mine/train")],
    "docs/evaluation.md": [lambda: a_run("runs/x"), sintel, bonn],
    "docs/inference.md": [lambda: a_video("clip.mp4"), lambda: a_run("runs/x"), a_training, pointmaps],
    "docs/own_videos.md": [bases, lambda: shards("own/train", "own/val")],
    "docs/performance.md": [],
    "docs/slurm.md": [],
    "docs/training.md": [a_training],
}  # fmt: skip


# --- the lines


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder in which a page's lines run, made when its first line does."""

    @cache
    def make(page: str) -> Path:
        folder = tmp_path_factory.mktemp(Path(page).stem)
        with contextlib.chdir(folder):
            for prepare in PREPARE[page]:
                prepare()
        return folder

    return make


def pasted() -> Iterator[pytest.ParameterSet]:
    for page, lines in lines_here().items():
        for words in lines if page != "docs/slurm.md" else []:
            marks = pytest.mark.slow if plain(words) in LONG else ()
            yield pytest.param(page, words, id=f"{page}: {plain(words)[:60]}", marks=marks)


@pytest.mark.parametrize(("page", "words"), list(pasted()))
def test_a_line_is_pasted(page: str, words: list[str], folder_of: Callable[[str], Path]) -> None:
    with contextlib.chdir(folder_of(page)):
        for made in made_by(words) if words[0] == "make" else [words]:
            run(made)


def run(words: list[str]) -> None:
    """Run one line, but quickly; a training that needs processes of its own gets them."""
    program, verb, *rest = shortened(words)
    if program == "tensorboard":
        python("tensorboard.main", verb, *rest, "--inspect")
    elif program != "one4d":
        main = importlib.import_module(program).main
        assert main(quick(program.removeprefix("data_prep."), [verb, *rest])) == 0, words
    elif verb == "fit" and any("devices=" in word or LARGE in word for word in rest):
        python("one4d_pl.fit", *quick(verb, rest))
    else:
        assert command(verb)(quick(verb, rest)) == 0, words


def python(module: str, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=PROCESS_TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (words, done.stderr[-3000:])


def quick(verb: str, words: list[str]) -> list[str]:
    """Return a command's words for small files and few steps."""
    words = [word.removeprefix("/") if word.startswith("/data/") else word for word in words]
    for option, value in {"--jobs": "1", "--size": "48x64"}.items():
        if option in words:
            words[words.index(option) + 1] = value
    large = any(LARGE in word for word in words)
    if verb == "generate":
        if "--memory" in words:  # of a GPU
            del words[words.index("--memory") :][:2]
        return [*words, "--steps", "1"]
    if verb == "fit":
        return [*words, *FEW_STEPS, *(ON_A_CPU if large else SMALL_TOYS)]
    if verb == "encode_latents":
        return [*words, *ON_A_CPU]
    if verb == "write_shards":
        return [*words, *SMALL_RAW]
    if verb == "demo":
        return [*words, "--clips", "2", "sampler.steps=1"]
    if verb == "evaluate":
        bench = words[words.index("--bench") + 1]
        few = ["--clips", "2"] if bench == "tasks" else ["--sequences", SEQUENCES[bench], "--no-pictures"]
        return [*words, *few, "sampler.steps=1"]
    return words


def made_by(words: list[str]) -> Iterator[list[str]]:
    """Yield the commands that `make` would run."""
    dry = ["make", "--dry-run", "-o", ".venv/.setup-stamp", *words[1:]]  # -o: as if it had been set up
    # not as the sub-make of a `make test` around this, which would speak of folders
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    said = subprocess.run(dry, cwd=REPO, env=alone, capture_output=True, text=True, check=True).stdout
    said = said.replace("\\\n", "")
    for text in said.splitlines():
        if loop := re.match(r"set -e; for bench in (.*?); do .*?(\.venv.*?); done", text):
            yield from (shlex.split(loop[2].replace("$bench", bench)) for bench in loop[1].split())
        else:
            yield shlex.split(text)


@pytest.mark.slurm
@pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())
def test_the_lines_of_slurm_are_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tartanair()
    bases()
    (tmp_path / "slurm").symlink_to(REPO / "slurm")
    with Lab(tmp_path / "lab", nodes=2, gpus=1) as lab:
        for words in lines_here()["docs/slurm.md"]:
            script = words.index("slurm/prep.sh")
            options = [*words[1:script], "--cpus-per-task=1", *(["--array=0-1"] if script > 1 else [])]
            verb, *rest = words[script + 1 :]
            job = lab.submit(
                *options, words[script], verb, *quick(verb, rest), cwd=tmp_path, VENV=sys.prefix, PYTHONPATH=str(REPO)
            )
            lab.wait(job, PROCESS_TIMEOUT_S)
            assert lab.states(job) == {"COMPLETED"}, (words, logs())


def logs() -> list[str]:
    return [path.read_text()[-2000:] for path in Path().glob("slurm-prep-*.out")]
