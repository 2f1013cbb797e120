"""Laws of the pre-flight: what would end a run is one line that names cause and cure, exit code 2, before training."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from one4d_pl.cluster import readiness
from one4d_pl.cluster.readiness import Place, Report, checkpoint_bytes, differences, faults_of, look
from one4d_pl.commands.preflight import main, meet, share
from one4d_pl.config import Config, to_yaml
from tests.conftest import REPO, free_port


def slurm(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables of one rank per node, as srun and the script set them."""
    variables = {"STEP_ID": 0, "PROCID": rank, "NTASKS": world, "LOCALID": 0, "NODEID": rank, "NNODES": world}
    names = {f"SLURM_{name}": str(value) for name, value in variables.items()}
    return {**names, "SLURMD_NODENAME": f"node{rank + 1}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture
def door(run_config, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the door on the tiny config with overrides; exit code, stdout, stderr."""

    def run(*overrides: str, timeout: float = 20) -> tuple[int, str, str]:
        path = tmp_path / "resolved.yaml"
        path.write_text(to_yaml(run_config(*overrides)))
        code = main(["--config", str(path), "--timeout", str(timeout)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_sound_run_passes_and_leaves_nothing_behind(door, tmp_path):
    code, out, err = door()
    assert (code, err) == (0, "") and "1 ranks on 1 nodes, all-reduce" in out
    assert list((tmp_path / "run").iterdir()) == []


def broken_base(tmp_path: Path, config: Config) -> list[str]:
    folder = shutil.copytree(config.base.path, tmp_path / "base")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    return [f"base.path={folder}"]


def broken_shard(tmp_path: Path, config: Config) -> list[str]:
    folder = shutil.copytree(config.data.sources[0].path, tmp_path / "shards")
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1  # inside the first sample
    shard.write_bytes(content)
    return [f"data.sources=[{{path: {folder}}}]"]


def other_run(tmp_path: Path, config: Config) -> list[str]:
    folder = tmp_path / "run/checkpoints/step-00000004"
    folder.mkdir(parents=True)
    stored = OmegaConf.to_container(OmegaConf.structured(config))
    (folder / "trainer.json").write_text(json.dumps({"step": 4, "config": stored, "sha256": {}}))
    return ["optim.lr=3e-4"]


def no_folder(tmp_path: Path, config: Config) -> list[str]:
    (tmp_path / "file").touch()
    return [f"run_dir={tmp_path}/file/run"]


FAULTS: dict[str, tuple[Callable[[Path, Config], list[str]], list[str]]] = {  # what is done, words of the line
    "wrong path": (lambda t, c: ["data.sources=[{path: nowhere}]"], ["data.sources", "nowhere", "write_shards"]),
    "missing weights": (lambda t, c: ["base.path=nowhere"], ["base.path", "nowhere", "fetch-weights"]),
    "incomplete weights": (broken_base, ["base.path", "transformer lacks"]),
    "unreadable shard": (broken_shard, ["shards", "shard-000000.tar", "checksum", "check_shards"]),
    "full disk": (lambda t, c: ["train.keep_last=1000000000"], ["run_dir", "GB free", "train.keep_last"]),
    "stale run folder": (other_run, ["run_dir", "another config", "optim.lr", "train.init_from"]),
    "run folder that cannot be": (no_folder, ["run_dir", "cannot write", "file/run"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_exit_code_2(fault, door, run_config, tmp_path):
    prepare, words = FAULTS[fault]
    code, _, err = door(*prepare(tmp_path, run_config()))
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert [word for word in words if word not in err] == [], err
    assert not list(tmp_path.glob("run/.preflight*"))


def test_slurm_and_config_must_agree_on_the_processes(door, monkeypatch):
    for name, value in slurm(0, 4, free_port()).items():
        monkeypatch.setenv(name, value)
    code, _, err = door("train.strategy=ddp", "train.devices=2")
    assert code == 2 and err.startswith(
        "error: train.num_nodes, train.devices: 1 x 2 = 2 processes, but SLURM started 4"
    )
    assert len(err.splitlines()) == 1


def test_a_port_in_use_is_named(door, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in slurm(0, 1, port).items():
            monkeypatch.setenv(name, value)
        code, _, err = door()
    assert code == 2 and err == f"error: MASTER_PORT: {port} is in use on node1; unset it or choose another\n"


def test_an_address_that_nobody_answers_is_named(door, monkeypatch):
    for name, value in slurm(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    code, _, err = door("train.strategy=ddp", "train.num_nodes=2", timeout=1)
    assert code == 2 and err.startswith("error: MASTER_ADDR: rank 1 on node2 does not reach rank 0")


def test_ranks_that_do_not_report_are_named():
    place = Place(0, 3, 0, "node1", 0, 3, True, "127.0.0.1", 0)
    faults = share(Report("node1", {}), place, meet(place, 1), 0.5, list)
    assert len(faults) == 1 and faults[0].startswith("ranks 1, 2 of 3 have not reported")


def test_a_node_that_sees_another_folder_is_named(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(readiness, "SHARED_FOLDER_PATIENCE_S", 0.1)
    report = look(run_config(), Place(2, 3, 0, "node3", 2, 3, True, "", 0), tmp_path / "elsewhere" / "probe")
    assert len(report.faults) == 1 and report.faults[0].startswith("run_dir:")
    assert "shared storage" in report.faults[0]
    same = [replace(report, node=f"node{i}") for i in (3, 3, 5, 7, 8)]
    assert faults_of(same) == [f"node3, node5, node7 ...: {report.faults[0]}"]  # one line, however many see it


def test_nodes_with_other_weights_or_versions_are_told_apart():
    reports = [Report(f"node{i}", {"torch": "2.13.0", "peft": "1"}, "a" * 64) for i in range(1, 6)]
    assert differences(reports) == []
    reports[2].versions = {"torch": "2.12.0", "peft": "1"}
    reports[4].base_fingerprint = "b" * 64
    assert differences(reports) == [
        "mixed versions between nodes: torch is 2.13.0 on node1, node2, node4 ...; 2.12.0 on node3; use one VENV that "
        "all nodes see",
        "base.path: other weights on other nodes: aaaaaaaaaaaa on node1, node2, node3 ...; bbbbbbbbbbbb on node5; "
        "copy them again",
    ]


def test_two_processes_meet_and_notice_mixed_versions(run_config, tmp_path):
    path, port = tmp_path / "resolved.yaml", free_port()
    path.write_text(to_yaml(run_config("train.strategy=ddp", "train.num_nodes=2")))
    older = tmp_path / "older" / "peft-0.1.dist-info"  # found first, as an older environment's would be
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    processes = []
    for rank in range(2):
        folders = os.pathsep.join([str(REPO), *([str(older.parent)] if rank else [])])
        ours = {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment = {**os.environ, **slurm(rank, 2, port), **ours}
        command = [sys.executable, "-m", "one4d_pl", "preflight", "--config", str(path), "--timeout", "100"]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert said[0][1].startswith("error: mixed versions between nodes: peft is ")
    assert "0.1 on node2" in said[0][1] and len(said[0][1].splitlines()) == 1
    assert said[1][1] == "pre-flight: rank 0 tells what is wrong\n"


def test_a_stage_that_hangs_is_named_and_ended():
    code = (
        "import time; from one4d_pl.commands.preflight import Deadline\n"
        "Deadline(0.2, 'node4').begin('all-reduce'); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (2, "error: node4: all-reduce: not done after 0 s\n")


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_size_of_a_checkpoint_is_known_before_there_is_one(run_config, decay):
    from one4d_pl.fit import fit
    from one4d_pl.training.checkpoint_files import checkpoint_folder

    config = run_config("train.max_steps=1", f"optim.ema_decay={decay}")
    fit(config)
    files = checkpoint_folder(config.run_dir, 1).rglob("*.safetensors")
    assert checkpoint_bytes(config) == sum(tensor.nbytes for file in files for tensor in load_file(file).values())
