"""`make nano` in short: every experiment runs, a finished run is kept, a verdict needs a difference."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from scipy.stats import ttest_rel

from experiments.nano.__main__ import jobs_of, main
from experiments.nano.experiments import (
    BLOCKS_WITH_LINKS,
    EVERY_TASK,
    EXPERIMENTS,
    LINKS_ZEROED,
    OTHER_CLIP,
    REFERENCE,
    RUNS,
    SHIPPED,
    Claim,
)
from experiments.nano.measure import edge_pixels
from experiments.nano.report import LABELS
from experiments.nano.verdicts import judge
from experiments.nano.work import Plan, _digest, recipe_of
from one4d_pl.cluster.signals import INTERRUPTED
from one4d_pl.config import DEMO_ADAPTERS, ConfigError, load_config
from one4d_pl.data.decode import Draw, make_sample
from one4d_pl.evaluation.fit_quality import links_zeroed
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.models.adapters import AdapterCard
from one4d_pl.models.base_files import resolve_base, transformer_config
from one4d_pl.models.coupling import couple
from one4d_pl.toy.world import render_clip

SMALL = [
    "data.height=16", "data.width=32", "train.max_steps=1", "train.global_batch_size=2", "train.micro_batch_size=2",
    "val.every=1", "val.clips=2", "val.sigmas=[0.5]", "optim.cooldown_steps=0", "train.save_every=1",
    "sampler.steps=1",
]  # fmt: skip
TOY = {"train_synthetic": 4, "train_real": 2, "val": 2, "seed": 20000}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Makes arguments of a `make nano` of one step a run on two clips, on a world of its own; later options win."""
    folder = tmp_path_factory.mktemp("nano")
    world = folder / "toy"
    toy = ", ".join([f"root: {world}", *(f"{name}: {value}" for name, value in TOY.items())])
    yaml = folder / "short.yaml"
    yaml.write_text(f"""
data:
  sources: [{{path: {world}/train_synthetic, weight: 0.75}}, {{path: {world}/train_real, weight: 0.25}}]
  val_sources: [{{path: {world}/val}}]
  toy: {{{toy}}}
""")
    files = ["--config", "configs/nano.yaml", "--config", str(yaml)]
    options = [*files, "--out", str(folder / "out"), "--clips", "2", "--seeds", "1", "--jobs", "0"]
    return lambda *more, override=(): [*options, *more, *SMALL, *override]


def folder_of(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--out") + 1])


@pytest.mark.filterwarnings("ignore:.*biased upwards.*")
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_every_experiment_runs_and_is_reported(short, experiment, capsys, monkeypatch):
    out = folder_of(short())
    world = out.parent / "toy"
    synthetic = f"data.sources=[{{path: {world}/train_synthetic}}]"  # the one run that names a folder of its own
    run = RUNS["synthetic_only"]
    monkeypatch.setitem(RUNS, run.name, type(run)(run.name, (synthetic,), run.seeds))
    assert main(short("--only", experiment.name)) == 0
    report = capsys.readouterr().out
    assert report == (out / "report.md").read_text() + "\n"
    assert f"## {experiment.name}" in report and "(not run)" not in report and "| not run |" not in report
    for name in experiment.runs:
        assert (RUNS[name].kind == "references") != (f"| `{name}` |" in report), name
    for claim in experiment.claims:
        assert claim.text in report and "cannot tell" in report  # one seed shows no spread
    with Image.open(out / "figures" / f"{experiment.name}.png") as figure:
        assert figure.size[1] > 200
    for name in experiment.runs:
        found = json.loads((out / f"{name}-0" / "result.json").read_text())
        assert all(math.isfinite(value) for value in found["numbers"].values()), name
        if RUNS[name].kind not in ("sample", "references"):
            assert set(experiment.metrics) <= found["numbers"].keys()
        assert bool(found["curves"]) == (RUNS[name].kind == "train")
    assert not list(out.glob("*/checkpoints"))
    if experiment.name == "links":
        errors = {
            name: json.loads((out / f"{name}-0" / "result.json").read_text())["numbers"]["video.rel_error"]
            for name in (SHIPPED, OTHER_CLIP, *LINKS_ZEROED)
        }
        assert len(set(errors.values())) == len(errors)  # every breaking reaches the samples
    if experiment.name == "unified":
        fresh = "standardised_and_bent"  # as the shipped adapters are
        assert main(short("--run", f"{fresh}:0")) == 0
        begun, trained = (json.loads((out / f"{name}-0" / "result.json").read_text()) for name in (fresh, EVERY_TASK))
        for knob in ("dlc.standardise_xyz", "data.pointmap_power"):  # or their losses would not compare
            assert begun["recipe"][knob] == trained["recipe"][knob]
        (step, loss), (_, untrained) = trained["curves"]["xyz"][0], begun["curves"]["xyz"][0]
        assert step == 0 and loss < untrained


@pytest.mark.filterwarnings("ignore:.*biased upwards.*")
def test_a_finished_run_is_kept_and_run_again_it_gives_its_numbers(short, capsys):
    arguments = short("--run", f"{REFERENCE}:0")
    out = folder_of(arguments)
    assert main(arguments) == 0
    path = out / f"{REFERENCE}-0" / "result.json"
    first, written = json.loads(path.read_text()), path.stat().st_mtime_ns
    assert main(arguments) == 0
    assert path.stat().st_mtime_ns == written
    path.unlink()
    assert main(arguments) == 0
    again = json.loads(path.read_text())
    assert again["numbers"] == first["numbers"] and again["curves"] == first["curves"]
    assert main(short("--run", f"{REFERENCE}:0", override=["optim.lr=1e-5"])) == 2
    assert "a run of another config" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*biased upwards.*")
def test_runs_of_their_own_processes_and_one_that_fails(short, tmp_path, capsys):
    options = ["--only", "sparsity", "--jobs", "2"]
    assert main(short(*options, "--out", str(tmp_path))) == 0
    (sparsity,) = (experiment for experiment in EXPERIMENTS if experiment.name == "sparsity")
    assert len(list(tmp_path.glob("*/result.json"))) == len(sparsity.runs)
    assert all(path.stat().st_size for path in tmp_path.glob("*/log.txt"))
    assert main(short(*options, "--out", str(tmp_path / "b"), "--adapters", str(tmp_path / "none"))) == 2
    assert "exit code 2; see log.txt there" in capsys.readouterr().err.splitlines()[-1]


def test_ended_from_outside_it_ends_its_runs(short, tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.nano",
        *short("--only", "data", "--jobs", "1", "--out", str(tmp_path)),
    ]
    log = tmp_path / f"{REFERENCE}-0" / "log.txt"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as nano:
        try:
            deadline = time.monotonic() + 120
            while not log.exists() or not (children := Path(f"/proc/{nano.pid}/task/{nano.pid}/children").read_text()):
                assert time.monotonic() < deadline and nano.poll() is None
                time.sleep(0.1)
            nano.send_signal(signal.SIGTERM)
            assert nano.wait(150) == INTERRUPTED and "the same command goes on" in nano.stderr.read()
        finally:
            nano.kill()
    assert not [child for child in children.split() if Path(f"/proc/{child}").exists()]


@pytest.mark.parametrize("wrong", [["--run", "dlc"], ["--run", "nothing:0"], ["--clips", "1"], ["--seeds", "0"]])
def test_a_mistake_is_one_line(wrong, capsys):
    assert main(wrong) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_goes_on_starts_from_the_adapters_wherever_they_lie(tmp_path, capsys):
    run, copy = RUNS[EVERY_TASK], tmp_path / "adapters"
    shutil.copytree(DEMO_ADAPTERS, copy)
    here, there = Plan(tmp_path), Plan(tmp_path, adapters=copy)
    assert there.config(run, 0).train.init_from == str(copy)
    assert here.config(RUNS[REFERENCE], 0).train.init_from is None
    assert recipe_of(here, run, 0) == recipe_of(there, run, 0)
    card = json.loads((copy / "card.json").read_text())
    (copy / "card.json").write_text(json.dumps(card | {"step": card["step"] + 1}))
    _digest.cache_clear()  # taken once per folder
    assert recipe_of(here, run, 0) != recipe_of(there, run, 0)
    begun = here.folder(run, 0) / "recipe.json"
    begun.parent.mkdir()
    begun.write_text(json.dumps(recipe_of(there, run, 0), indent=1) + "\n")
    assert main(["--run", f"{EVERY_TASK}:0", "--out", str(tmp_path)]) == 2
    assert "begun under another config (nano.adapters); remove the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "count"),
    [("links_zeroed", 10), ("links_to_frames_zeroed", 5), *((f"link_{i}_zeroed", 2) for i in BLOCKS_WITH_LINKS)],
)
def test_links_are_zeroed_by_name_and_put_back(broken, count):
    config = load_config(["configs/nano.yaml"], [])
    pipeline = One4DPipeline.open(AdapterCard.read(DEMO_ADAPTERS).configure(config), DEMO_ADAPTERS)
    before = {name: weight.clone() for name, weight in pipeline.transformer.links.named_parameters()}
    assert len(before) == 10 and all(weight.any() for weight in before.values())
    with links_zeroed(pipeline, LINKS_ZEROED[broken]):
        zeroed = [name for name, weight in pipeline.transformer.links.named_parameters() if not weight.any()]
    assert len(zeroed) == count and all(fnmatch(name, LINKS_ZEROED[broken]) for name in zeroed)
    for name, weight in pipeline.transformer.links.named_parameters():
        assert torch.equal(weight, before[name])
    with (
        pytest.raises(ConfigError, match=r"none is called 9\.\*; this adapter has 0\.xyz_to_rgb"),
        links_zeroed(pipeline, "9.*"),
    ):
        pass


def test_claims_speak_of_what_is_run_and_measured():
    for experiment in EXPERIMENTS:
        assert set(experiment.runs) <= RUNS.keys() and set(experiment.metrics) <= LABELS.keys()
        for claim in experiment.claims:
            assert {claim.better, claim.than} <= set(experiment.runs) and claim.metric in experiment.metrics
    jobs = jobs_of(list(EXPERIMENTS))
    assert len(set(jobs)) == len(jobs) == sum(run.seeds for run in RUNS.values())  # none is forgotten
    assert [seed for _, seed in jobs] == sorted(seed for _, seed in jobs)


def test_training_on_shows_pointmaps_as_the_adapters_know_them(tmp_path):
    card = json.loads((DEMO_ADAPTERS / "card.json").read_text())
    for power, statistics in ((1.0, None), (0.7, {"mean": [0.0], "std": [1.0]})):
        changed = card | {"pointmap_power": power, "xyz_statistics": statistics}
        (tmp_path / "card.json").write_text(json.dumps(changed))
        config = Plan(tmp_path, adapters=tmp_path).config(RUNS[EVERY_TASK], 0)
        assert config.data.pointmap_power == power
        assert config.dlc.standardise_xyz == (statistics is not None)


def test_all_couplings_train_as_many_parameters():
    settings, counts = transformer_config(resolve_base("embedded")), {}
    for name in (REFERENCE, "channel", "width"):
        config = load_config(["configs/nano.yaml"], list(RUNS[name].overrides))
        with torch.device("meta"):
            model = couple(WanTransformer3DModel.from_config(settings), config.dlc, seed=0)
        counts[name] = sum(parameter.numel() for _, parameter in model.trainable_parameters())
    for name, count in counts.items():
        assert count == pytest.approx(counts[REFERENCE], rel=0.02), name


ERROR, DB = "video.rel_error", "image.hidden_db"


@pytest.mark.parametrize(
    ("better", "worse", "metric", "slack", "word"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.2, 1.81], ERROR, 0.0, "holds"),
        ([2.0, 2.2, 1.81], [1.0, 1.1, 0.9], ERROR, 0.0, "does not hold"),
        ([2.0, 2.1, 1.91], [1.0, 1.1, 0.9], DB, 0.0, "holds"),
        ([1.0, 1.1, 0.9], [1.01, 1.09, 0.92], ERROR, 0.0, "cannot tell"),
        ([1.05, 1.156, 0.944], [1.0, 1.1, 0.9], ERROR, 0.0, "does not hold"),
        ([1.05, 1.156, 0.944], [1.0, 1.1, 0.9], ERROR, 0.1, "holds"),
        ([1.05, 1.15, 0.951], [1.0, 1.1, 0.9], DB, 0.1, "holds"),
        ([0.95, 1.05, 0.849], [1.0, 1.1, 0.9], DB, 0.0, "does not hold"),
        ([0.95, 1.05, 0.849], [1.0, 1.1, 0.9], DB, 0.1, "holds"),
        ([1.0], [2.0, 2.2, 1.81], ERROR, 0.0, "holds"),  # with the noise of the others
        ([], [2.0], ERROR, 0.0, None),
    ],
)
def test_a_verdict_needs_a_difference_beyond_chance(better, worse, metric, slack, word):
    others = {
        "c": numbered([1.0, 1.101, 0.899]),
        "d": numbered([3.0, 3.1, 2.901] if metric == DB else [3.0, 3.3, 2.71]),
    }
    verdict = judge(Claim("", metric, "a", "b", slack), {"a": numbered(better), "b": numbered(worse), **others})
    assert (None if verdict is None else verdict.outcome) == word


def numbered(values: Iterable[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_a_verdict_on_two_runs_is_students_paired_t_test():
    rng, told = np.random.default_rng(0), 0
    for _ in range(400):
        a, b = rng.lognormal(size=4), rng.lognormal(0.7, size=4)
        verdict = judge(Claim("", ERROR, "a", "b"), {"a": numbered(a), "b": numbered(b)})
        expected = ttest_rel(np.log(b), np.log(a))
        assert (verdict.outcome != "cannot tell") == (expected.pvalue < 0.05)
        assert verdict.difference / verdict.standard_error == pytest.approx(expected.statistic)
        told += verdict.outcome != "cannot tell"
    assert 0 < told < 200


def test_what_a_seed_does_to_every_run_is_no_noise_and_what_is_not_known_gives_no_verdict():
    a, b = [1.0, 5.0, 0.2], [1.1, 5.51, 0.2198]
    assert judge(Claim("", ERROR, "a", "b"), {"a": numbered(a), "b": numbered(b)}).outcome == "holds"
    for values in ({"a": {0: 1.0}, "b": {0: 2.0}}, {"a": {0: 1.0, 1: 1.1}, "b": {2: 9.0, 3: 9.1}}):
        verdict = judge(Claim("", ERROR, "a", "b"), values)
        assert verdict.outcome == "cannot tell" and math.isnan(verdict.standard_error)


def test_edges_are_where_distances_jump():
    data = load_config(["configs/nano.yaml"], []).data
    clip = make_sample(render_clip(3, 9, 48, 64), 0, Draw("video", torch.ones(9, dtype=torch.bool), False), data, None)
    edges = edge_pixels(clip)
    assert 0.01 < float(edges.float().mean()) < 0.5 and not bool((edges & ~clip.valid).any())
    flat = clip.pointmap.clone()
    flat[:, :, :, :32], flat[:, :, :, 32:] = 0.2, 0.6
    steps = edge_pixels(type(clip)(**{**clip.__dict__, "pointmap": flat, "valid": torch.ones_like(clip.valid)}))
    assert steps[:, :, 31:33].all() and not steps[:, :, :31].any() and not steps[:, :, 33:].any()
