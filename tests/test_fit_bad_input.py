"""Laws of the door: a user's mistake is one line that names cause and cure, exit code 2, before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from one4d_pl import fit

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DLC = ["--config", str(CONFIGS / "dlc.yaml")]
PAPER = [*DLC, "--config", str(CONFIGS / "scale/wan_14b.yaml"), "--config", str(CONFIGS / "data/one4d_mix.yaml")]

MISTAKES: dict[str, tuple[list[str], list[str]]] = {  # arguments, words of the line
    "missing config": (["--config", "nowhere/dlc.yaml"], ["nowhere/dlc.yaml", "no such config file"]),
    "missing second config": ([*DLC, "--config", "nowhere.yaml"], ["nowhere.yaml", "no such config file"]),
    "unknown key": ([*DLC, "train.max_stepz=3"], ["train.max_stepz", "did you mean train.max_steps?"]),
    "bad value": ([*DLC, "train.max_steps=many"], ["train.max_steps", "many", "Integer"]),
    "impossible value": ([*DLC, "data.num_frames=16"], ["data.num_frames", "16", "try 17, 49 or 81"]),
    "no override": ([*DLC, "max_steps"], ["max_steps", "section.key=value"]),
    "missing weights": ([*DLC, "base.path=data/tiny_wan"], ["base.path", "data/tiny_wan", "fetch-weights"]),
    "missing weights of the paper's scale": (
        PAPER,
        ["base.path", "weights/Wan2.1-Fun-V1.1-14B-InP", "fetch-weights", "--run"],
    ),
    "missing shards": (
        [*DLC, "data.sources=[{path: shards/mine}]"],
        ["data.sources", "shards/mine", "python -m data_prep.write_shards", "--out shards/mine"],
    ),
    "missing validation shards": (
        [*DLC, "data.val_sources=[{path: shards/val}]"],
        ["data.val_sources", "shards/val", "python -m data_prep.write_shards"],
    ),
    "no sources": ([*DLC, "data.sources=[]"], ["data.sources", "--config configs/data/toy.yaml"]),
    "world that does not divide the batch": (
        [*DLC, "train.strategy=ddp", "train.devices=3", "train.micro_batch_size=1"],
        ["train.global_batch_size", "16", "3 processes", "legal numbers of processes: [1, 2, 4, 8, 16]"],
    ),
    "many processes without a strategy": ([*DLC, "train.devices=2"], ["train.strategy", "use ddp"]),
    "missing adapter": (
        [*DLC, "train.init_from=runs/other/adapter"],
        ["train.init_from", "runs/other/adapter", "card.json"],
    ),
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs start where nothing lies; the hub's cache is empty too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, capsys, monkeypatch, empty_folder):
    def train(config: object) -> None:
        raise AssertionError("the run was started")

    monkeypatch.setattr(fit, "fit", train)
    arguments, words = MISTAKES[mistake]
    assert fit.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n") and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ")
    assert [word for word in words if word not in captured.err] == []
    assert list(empty_folder.iterdir()) == []  # nothing was begun


def test_no_mistake_can_hide_behind_missing_weights(capsys, empty_folder):
    """With the weights there, the paper's recipe next asks for its shards."""
    base = empty_folder / "base"
    base.mkdir()
    (base / "model_index.json").write_text("{}")
    assert fit.main([*PAPER, f"base.path={base}"]) == 2
    assert "shards/omniworld_game/train" in capsys.readouterr().err


def test_without_a_config_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as caught:
        fit.main([])
    assert caught.value.code == 2 and "--config" in capsys.readouterr().err


def test_every_mistake_is_found_before_torch_is_imported(empty_folder):
    code = (
        "import json, sys\n"
        "from one4d_pl.fit import main\n"
        f"codes = [main(arguments) for arguments in {[arguments for arguments, _ in MISTAKES.values()]!r}]\n"
        "print(json.dumps([codes, sorted(sys.modules)]))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_CACHE": str(empty_folder / "hub")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=empty_folder, env=environment
    )
    codes, modules = json.loads(result.stdout)
    assert codes == [2] * len(MISTAKES)
    assert len(result.stderr.splitlines()) == len(MISTAKES)
    assert not {"torch", "lightning", "diffusers", "transformers", "deepspeed", "numpy"} & set(modules)
