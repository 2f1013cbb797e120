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
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from scipy.stats import ttest_rel

from experiments.nano.__main__ import _next, jobs_of, main
from experiments.nano.experiments import (
    CLAIMS,
    ERROR,
    EXPERIMENTS,
    FD,
    HIDDEN,
    LABELS,
    LINKS_ZEROED,
    OTHER_CLIP,
    REFERENCE,
    RUNS,
    Claim,
)
from experiments.nano.report import pooled
from experiments.nano.verdicts import judge
from experiments.nano.work import Plan
from one4d_pl.cluster.signals import INTERRUPTED
from one4d_pl.config import ConfigError, load_config
from one4d_pl.evaluation.fit_quality import links_zeroed
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.models.base_files import resolve_base, transformer_config
from one4d_pl.models.coupling import couple

SMALL = [
    "data.height=16", "data.width=32", "train.max_steps=1", "train.global_batch_size=2", "train.micro_batch_size=2",
    "train.compile=false", "val.every=1", "val.clips=2", "val.sigmas=[0.5]", "optim.warmup_steps=0",
    "optim.cooldown_steps=0", "train.save_every=1", "sampler.steps=1",
]  # fmt: skip
TOY = {"level": "clear", "train_synthetic": 4, "train_real": 2, "val": 2, "seed": 20000}


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
@pytest.mark.parametrize(
    "experiment",
    # `links` trains, samples and breaks; with the others minutes
    [pytest.param(e, id=e.name, marks=() if e.name == "links" else pytest.mark.slow) for e in EXPERIMENTS],
)
def test_every_experiment_runs_and_is_reported(short, experiment, capsys):
    out = folder_of(short())
    assert main(short("--only", experiment.name)) == 0
    report = capsys.readouterr().out
    assert report == (out / "report.md").read_text() + "\n"
    table = report.split(f"## {experiment.name}\n")[1].split("\n## ")[0]
    assert "(not run)" not in table
    for name in experiment.runs:
        assert (RUNS[name].kind == "references") != (f"| `{name}` |" in table), name
        found = json.loads((out / f"{name}-0" / "result.json").read_text())
        assert all(math.isfinite(value) for value in found["numbers"].values()), name
        assert bool(found["curves"]) == (RUNS[name].kind == "train")
        if RUNS[name].kind == "train":
            assert set(experiment.metrics) - {"video.hidden_db"} <= found["numbers"].keys()
    for claim in CLAIMS:  # one seed shows no spread
        told = next(line for line in report.splitlines() if claim.text in line)
        ran = all((out / f"{name}-0").exists() for name in (claim.better, claim.than))
        assert ("cannot tell" if ran else "not run") in told
    assert not list(out.glob("*/checkpoints"))
    assert [path.parent.name for path in out.glob("*/adapters")] == [f"{REFERENCE}-0"]
    if experiment.name == "links":
        errors = {
            json.loads((out / f"{name}-0" / "result.json").read_text())["numbers"]["video.rel_error"]
            for name in (REFERENCE, LINKS_ZEROED, OTHER_CLIP)
        }
        assert len(errors) == 3  # both breakings reach the samples


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
def test_runs_of_their_own_processes_and_a_sampling_without_adapters(short, tmp_path, capsys):
    arguments = short("--only", "sparsity", "--jobs", "2", "--out", str(tmp_path))
    assert main(arguments) == 0
    (sparsity,) = (experiment for experiment in EXPERIMENTS if experiment.name == "sparsity")
    assert len(list(tmp_path.glob("*/result.json"))) == len(sparsity.runs)
    assert all(path.stat().st_size for path in tmp_path.glob("*/log.txt"))
    shutil.rmtree(tmp_path / f"{REFERENCE}-0" / "adapters")
    shutil.rmtree(tmp_path / "given_0.5-0")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "exit code 2; see log.txt there" in capsys.readouterr().err.splitlines()[-1]
    assert "adapters: not there, and given_0.5 samples them" in (tmp_path / "given_0.5-0" / "log.txt").read_text()


def test_ended_from_outside_it_ends_its_runs(short, tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.nano",
        *short("--only", "coupling", "--jobs", "1", "--out", str(tmp_path)),
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


def test_a_sampling_waits_for_its_training_and_the_last_that_never_can_start_says_so(tmp_path):
    plan, sampling, training = Plan(tmp_path), (RUNS["guidance_4"], 0), (RUNS["width"], 0)
    assert _next(plan, [sampling, training], idle=False) == training
    assert _next(plan, [sampling], idle=False) is None  # what it waits for is under way
    assert _next(plan, [sampling], idle=True) == sampling and _next(plan, [], idle=True) is None


def test_links_are_zeroed_and_put_back():
    pipeline = One4DPipeline.open(load_config(["configs/nano.yaml"], []), None)
    weights = list(pipeline.transformer.links.parameters())
    for number, weight in enumerate(weights):
        weight.data.fill_(number + 1.0)
    assert len(weights) == 10
    with links_zeroed(pipeline):
        assert not any(weight.any() for weight in weights)
    assert all(bool((weight == number + 1.0).all()) for number, weight in enumerate(weights))
    without = One4DPipeline.open(load_config(["configs/nano.yaml"], list(RUNS["links_0"].overrides)), None)
    with pytest.raises(ConfigError, match="this adapter has none to be zeroed"), links_zeroed(without):
        pass


def test_ten_claims_speak_of_what_is_run_and_measured():
    assert len(CLAIMS) == 10
    measured = {(run, metric) for experiment in EXPERIMENTS for run in experiment.runs for metric in experiment.metrics}
    for claim in CLAIMS:
        assert {(claim.better, claim.metric), (claim.than, claim.metric)} <= measured and claim.source
        assert {claim.better, claim.than} <= set(pooled(claim))
    assert {name for name, _ in measured} == set(RUNS) and {metric for _, metric in measured} == set(LABELS)
    for experiment in EXPERIMENTS:  # what is sampled is trained there, and sampled with the same seeds
        assert REFERENCE in experiment.runs
    for run in RUNS.values():
        assert run.kind != "sample" or run.seeds <= RUNS[REFERENCE].seeds
        # all are measured on the same clips
        assert not [override for override in run.overrides if override.startswith(("data.", "val.", "train."))]
    jobs = jobs_of(list(EXPERIMENTS))
    assert len(set(jobs)) == len(jobs) == sum(run.seeds for run in RUNS.values())  # none is forgotten
    assert [seed for _, seed in jobs] == sorted(seed for _, seed in jobs)
    assert sum(run.kind == "train" for run, _ in jobs) == 17


def test_noise_is_pooled_over_runs_that_are_alike():
    trained = {"dlc", "width", "channel", "links_0", "links_1"}
    assert set(pooled(Claim("", ERROR, "dlc", "width"))) == trained | {"reconstruction_only"}
    assert set(pooled(Claim("", HIDDEN, "dlc", "width"))) == trained | {"generation_only"}
    assert set(pooled(Claim("", FD, "guidance_4", "dlc"))) == {"dlc", "given_0.5", "guidance_4", "guidance_6"}


def test_all_couplings_train_as_many_parameters():
    settings, counts = transformer_config(resolve_base("embedded")), {}
    for name in (REFERENCE, "channel", "width"):
        config = load_config(["configs/nano.yaml"], list(RUNS[name].overrides))
        with torch.device("meta"):
            model = couple(WanTransformer3DModel.from_config(settings), config.dlc, seed=0)
        counts[name] = sum(parameter.numel() for _, parameter in model.trainable_parameters())
    for name, count in counts.items():
        assert count == pytest.approx(counts[REFERENCE], rel=0.02), name


@pytest.mark.parametrize(
    ("better", "worse", "metric", "slack", "word"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.2, 1.81], ERROR, 0.0, "holds"),
        ([2.0, 2.2, 1.81], [1.0, 1.1, 0.9], ERROR, 0.0, "does not hold"),
        ([2.0, 2.1, 1.91], [1.0, 1.1, 0.9], HIDDEN, 0.0, "holds"),
        ([1.0, 1.1, 0.9], [1.01, 1.09, 0.92], ERROR, 0.0, "cannot tell"),
        ([1.05, 1.156, 0.944], [1.0, 1.1, 0.9], ERROR, 0.0, "does not hold"),
        ([1.05, 1.156, 0.944], [1.0, 1.1, 0.9], ERROR, 0.1, "holds"),
        ([1.05, 1.15, 0.951], [1.0, 1.1, 0.9], HIDDEN, 0.1, "holds"),
        ([0.95, 1.05, 0.849], [1.0, 1.1, 0.9], HIDDEN, 0.0, "does not hold"),
        ([0.95, 1.05, 0.849], [1.0, 1.1, 0.9], HIDDEN, 0.1, "holds"),
        ([1.0], [2.0, 2.2, 1.81], ERROR, 0.0, "holds"),  # with the noise of the others
        ([], [2.0], ERROR, 0.0, None),
    ],
)
def test_a_verdict_needs_a_difference_beyond_chance(better, worse, metric, slack, word):
    others = {
        "c": numbered([1.0, 1.101, 0.899]),
        "d": numbered([3.0, 3.1, 2.901] if metric == HIDDEN else [3.0, 3.3, 2.71]),
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
