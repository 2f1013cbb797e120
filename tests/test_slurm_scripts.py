"""Laws of the cluster scripts that need no cluster: how they submit, what they refuse, what they copy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parents[1]
SCRIPTS = sorted((REPO / "slurm").glob("*.sh"))
# stand-ins for SLURM's commands: sbatch tells how it was called, srun that it was, the rest has nothing to say
STAND_INS = {
    "sbatch": 'printf "%s\\n" "$@"; env | grep -E "^(SBATCH_|NODES)" | sort',
    "srun": """echo "srun was called"; "$VENV/bin/python" -c "import one4d_pl; print(one4d_pl.__file__)"
               exit ${SRUN_EXIT:-0}""",
    "scontrol": '[ "$1" = requeue ] && { echo "requeue $2"; exit "${REQUEUE_EXIT:-0}"; }; echo node1',
    "squeue": 'case "$*" in *RUNNING*) echo "${RUNNING:-}" ;; *) date -d "+1 day" +%FT%T ;; esac',
    "scancel": "true",
}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script(tmp_path: Path) -> Run:
    """Run slurm/train_8node.sh in a copy of the checkout, with stand-ins for SLURM; variables by keyword."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("one4d_pl", "data_prep", "configs", "slurm"):
        shutil.copytree(REPO / name, checkout / name, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copytree(REPO / "one4d_pl/assets/tiny_wan", checkout / "one4d_pl/assets/tiny_wan")

    def run(*arguments: str, job: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        in_job = {
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1",
            "SLURM_CPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(checkout), "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip
        environment = {
            **inherited, **(in_job if job else {}), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "VENV": sys.prefix,
            "CONFIGS": "configs/dlc.yaml", "GPUS_PER_NODE": "1", "RUN_DIR": str(tmp_path / "run"), **variables,
        }  # fmt: skip
        command = ["bash", str(checkout / "slurm/train_8node.sh"), *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)

    return run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_bash(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_outside_a_job_the_script_submits_itself_with_the_sites_settings(script):
    done = script("--time=01:00:00", job=False, NODES="4", SBATCH_PARTITION="gpu")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:4] == ["--nodes=4", "--gpus-per-node=1", "--time=01:00:00", "slurm/train_8node.sh"]
    assert said[4:] == ["NODES=4", "SBATCH_PARTITION=gpu"]  # and nothing empty, which sbatch would take for a name
    done = script(job=False, SBATCH_GPUS_PER_NODE="h100:4")
    assert done.stdout.splitlines()[:2] == ["--nodes=8", "slurm/train_8node.sh"]  # the site's own is the environment's


def test_code_and_resolved_config_are_copied_and_a_requeue_keeps_them(script, tmp_path):
    overrides = "train.max_steps=7 'data.sources=[{path: data/toy/train_synthetic}]'"
    done = script(OVERRIDES=overrides)
    assert done.returncode == 0 and "done: " in done.stdout, done.stderr
    assert "1 processes, global batch 16, 7 steps, single; the paper's: 8, 32, 5500" in done.stdout
    code = tmp_path / "run/code"
    config = yaml.safe_load((code / "config.yaml").read_text())
    assert config["run_dir"] == str(tmp_path / "run") and config["train"]["max_steps"] == 7
    assert config["data"]["sources"] == [{"path": "data/toy/train_synthetic", "weight": 1.0}]
    assert (code / "one4d_pl/fit.py").is_file()
    assert f"{code}/one4d_pl/__init__.py\n" in done.stdout  # what runs is the copy, not the checkout around it
    marker = code / "one4d_pl/of_the_first_start"
    marker.touch()
    script(SLURM_RESTART_COUNT="1", OVERRIDES="train.max_steps=8")
    assert marker.exists() and yaml.safe_load((code / "config.yaml").read_text())["train"]["max_steps"] == 7
    script(OVERRIDES="train.max_steps=8")  # a new job
    assert not marker.exists() and yaml.safe_load((code / "config.yaml").read_text())["train"]["max_steps"] == 8
    assert len(list((tmp_path / "run/logs").iterdir())) >= 1 and not list((tmp_path / "run").glob(".code*"))


def test_a_mistake_is_one_line_and_exit_code_2(script, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        (tmp_path / "file").touch()
        (tmp_path / "owned").mkdir()
        (tmp_path / "owned/job").write_text("17\n")
        mistakes: list[tuple[dict[str, str], list[str]]] = [
            ({"NODES": "4"}, ["NODES: 4", "holds 1 nodes", "--nodes=4"]),
            ({"SLURM_GPUS_PER_NODE": "h100:4", "GPUS_PER_NODE": "8"}, ["GPUS_PER_NODE: 8", "4 GPUs", "per-node=8"]),
            ({"SLURM_SUBMIT_DIR": str(tmp_path)}, ["no slurm/env.sh", "submit from the checkout"]),
            ({"VENV": "/nowhere"}, ["VENV", "/nowhere/bin/python", "make setup"]),
            ({"RUN_DIR": str(tmp_path / "file/run")}, ["RUN_DIR", "file/run"]),
            ({"RUN_DIR": str(tmp_path / "owned"), "RUNNING": "17"}, ["RUN_DIR", "job 17 is training"]),
            ({"CONFIGS": "configs/nowhere.yaml"}, ["configs/nowhere.yaml", "no such config file"]),
            ({"OVERRIDES": "train.max_stepz=3"}, ["train.max_stepz", "did you mean train.max_steps?"]),
            ({"GPUS_PER_NODE": "3", "OVERRIDES": "train.strategy=ddp train.micro_batch_size=1"},
             ["train.global_batch_size", "3 processes"]),
            ({"MASTER_PORT": port}, ["MASTER_PORT", port, "in use"]),
        ]  # fmt: skip
        for variables, words in mistakes:
            done = script(**variables)
            lines = [line for line in done.stderr.splitlines() if not line.startswith("mkdir:")]
            assert (done.returncode, len(lines)) == (2, 1), (variables, done.stderr)
            assert [word for word in words if word not in lines[0]] == [], lines[0]
            assert "srun was called" not in done.stdout


def test_a_dead_launch_goes_back_to_the_queue_a_bounded_number_of_times(script):
    for start in range(4):
        done = script(SRUN_EXIT="1", SLURM_RESTART_COUNT=str(start))
        assert done.returncode == 0 and "requeue 4711" in done.stdout, done.stderr
    done = script(SRUN_EXIT="1", SLURM_RESTART_COUNT="4")
    assert done.returncode == 1 and "5 times in a row" in done.stderr and "requeue" not in done.stdout


def test_where_slurm_does_not_requeue_the_user_is_told(script):
    done = script(SRUN_EXIT="1", REQUEUE_EXIT="1")
    assert done.returncode == 1 and "submit it again and it continues" in done.stderr


@pytest.mark.parametrize("name", ["eval.sh", "prep.sh"])
def test_the_other_scripts_say_how_they_are_used(name, tmp_path):
    done = subprocess.run(
        ["bash", str(REPO / "slurm" / name)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "VENV": sys.prefix},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")


def test_an_evaluation_task_takes_its_benchmark_from_the_array(tmp_path):
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$@"\n')
    python.chmod(0o755)
    variables = {"BENCHES": "sintel bonn", "ROOTS": "/a /b", "VENV": str(tmp_path / "venv")}
    command = ["bash", str(REPO / "slurm/eval.sh"), "--ckpt", "x"]
    said = [
        subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, **variables, "SLURM_ARRAY_TASK_ID": task},
        )
        for task in ("1", "2")
    ]  # fmt: skip
    assert said[0].stdout == "-m one4d_pl evaluate --bench bonn --root /b --ckpt x\n", said[0].stderr
    assert said[1].returncode == 2 and "--array=0-1" in said[1].stderr
