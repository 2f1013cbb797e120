"""Laws of the writer: it may die at any instant, run on any number of processes, and its bytes are the same."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import parallel, units
from data_prep.captions import CaptionOptions
from data_prep.parallel import run_parallel
from data_prep.quality import reject_reason
from data_prep.units import UnitTask, benchmark_of, convert_unit, scene_of, split_units
from data_prep.write_shards import main
from one4d_pl.data.shards import ShardSet, write_shards
from one4d_pl.data.staging import Plan
from one4d_pl.data.tar_set import Manifest
from one4d_pl.errors import UserError
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Clip
from tests.data_prep.raw_layouts import write_trajectory
from tests.own_process import in_own_process

SIZE = ["--num-frames", "9", "--height", "16", "--width", "32"]
TOY = ["--source", "toy", *SIZE, "--count", "7", "--samples-per-shard", "2"]


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven toy clips in four shards, written in one go; not to be changed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main([*TOY, "--out", str(folder)]) == 0
    return folder


def test_the_door_writes_what_the_library_writes(undisturbed, tmp_path):
    write_shards((render_clip(seed, 9, 16, 32) for seed in range(7)), tmp_path, samples_per_shard=2)
    for path in tmp_path.glob("*.tar"):
        assert path.read_bytes() == (undisturbed / path.name).read_bytes()
    assert {path.name for path in tmp_path.glob("*.tar")} == {path.name for path in undisturbed.glob("*.tar")}


def test_a_further_run_changes_no_byte_and_no_date(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    hashes = contents(undisturbed)
    assert main([*TOY, "--out", str(undisturbed)]) == 0
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before
    assert contents(undisturbed) == hashes


def run_in_fork(out: Path) -> int:
    """The writer in a forked process (nothing to import again); its process id."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(main([*TOY, "--out", str(out)]))
    return pid


def kill_at_20_random_instants(expected: dict[str, str], tmp_path: Path) -> None:
    start = time.monotonic()
    os.waitpid(run_in_fork(tmp_path / "timed"), 0)
    duration = time.monotonic() - start
    instants, killed, stages = random.Random(0), 0, set()
    for attempt in range(200):
        if killed == 20:
            break
        out = tmp_path / f"{attempt}"
        while not (out / "manifest.json").exists():  # killed again and again, each time a little later
            pid = run_in_fork(out)
            time.sleep(instants.uniform(0.05, 0.7) * duration)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            killed += os.WIFSIGNALED(status)
            finished = {n: h for n, h in contents(out).items() if "/" not in n} if out.exists() else {}
            assert finished.items() <= expected.items()  # what has a final name is whole
            stages.add(len(finished))
            if killed == 20:
                break
        assert main([*TOY, "--out", str(out)]) == 0
        assert contents(out) == expected
        shutil.rmtree(out)
    assert killed == 20 and len(stages) > 2, stages  # it did die at different stages


def test_killed_at_20_random_instants_it_ends_byte_identical(undisturbed, tmp_path):
    in_own_process(kill_at_20_random_instants, contents(undisturbed), tmp_path)


def test_several_processes_killed_with_their_parent_leave_nothing_running_and_the_same_bytes(undisturbed, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_prep.write_shards", *TOY, "--jobs", "2", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob(".staging/unit-*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    workers = children_of(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    assert contents(out) == contents(undisturbed)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_tasks_of_an_array_job_make_the_same_bytes_whoever_comes_last(undisturbed, tmp_path, order, capsys):
    for done, rank in enumerate(order):
        assert not (tmp_path / "manifest.json").exists()
        assert main([*TOY, "--out", str(tmp_path), "--rank", str(rank), "--world", "3"]) == 0
        assert ("the others are not" in capsys.readouterr().out) == (done < 2)
    assert contents(tmp_path) == contents(undisturbed)


def test_other_settings_do_not_go_on_from_a_begun_or_finished_folder(undisturbed, tmp_path, capsys):
    before = contents(undisturbed)
    assert main([*TOY, "--out", str(undisturbed), "--count", "6"]) == 2
    assert "count (7 -> 6)" in capsys.readouterr().err
    assert contents(undisturbed) == before
    assert main([*TOY, "--out", str(tmp_path), "--rank", "0", "--world", "2"]) == 0
    assert main([*TOY, "--out", str(tmp_path), "--height", "32"]) == 2
    assert "begun with other settings: recipe.height (16 -> 32)" in capsys.readouterr().err


def test_a_limit_takes_the_first_clips_on_any_number_of_tasks(undisturbed, tmp_path):
    assert main([*TOY, "--limit", "3", "--out", str(tmp_path / "one")]) == 0
    for rank in (1, 0):
        assert main([*TOY, "--limit", "3", "--out", str(tmp_path / "two"), "--rank", str(rank), "--world", "2"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    limited = ShardSet.open(tmp_path / "one")
    assert [limited.key(n) for n in range(len(limited))] == [ShardSet.open(undisturbed).key(n) for n in range(3)]
    assert (tmp_path / "one/shard-000000.tar").read_bytes() == (undisturbed / "shard-000000.tar").read_bytes()


def test_excluded_clips_are_left_out_and_named(tmp_path, capsys):
    keys = [f"toy_synthetic_{n:08d}" for n in range(7)]
    listed = tmp_path / "exclude.txt"
    listed.write_text(f"# found by check_shards\n{keys[2]}  # flying points\n\n{keys[6]}\n")
    assert main([*TOY, "--exclude", str(listed), "--out", str(tmp_path / "out")]) == 0
    assert [e.key for e in ShardSet.open(tmp_path / "out").entries] == [k for k in keys if k not in (keys[2], keys[6])]


# --- what is dropped


def joined(before: Clip, after: Clip) -> Clip:
    return dataclasses.replace(before, frames=torch.cat([before.frames[:4], after.frames[4:]]))


def test_cuts_frozen_and_empty_clips_are_told_and_others_are_not():
    clips = [render_clip(seed, 9, 32, 48, domain) for seed in range(20) for domain in ("synthetic", "real")]
    assert [reject_reason(clip) for clip in clips] == [None] * len(clips)
    cuts = [reject_reason(joined(a, b)) for a, b in itertools.pairwise(clips)]
    assert sum(reason == "a cut before frame 4" for reason in cuts) >= 0.85 * len(cuts)  # some scenes look alike
    still = dataclasses.replace(clips[0], frames=clips[0].frames[:1].expand(9, -1, -1, -1))
    assert "frozen: 100 %" in str(reject_reason(still))
    stuttering = dataclasses.replace(clips[0], frames=clips[0].frames[torch.tensor([0, 1, 1, 1, 1, 1, 1, 2, 3])])
    assert "frozen" in str(reject_reason(stuttering))
    empty = dataclasses.replace(clips[0], valid=torch.zeros_like(clips[0].valid))
    assert "hardly any depth" in str(reject_reason(empty))


def write_toy_trajectory(folder: Path, clip: Clip) -> None:
    """A toy clip as a TartanAir trajectory; its geometry does not matter here."""
    frames = clip.frames.repeat_interleave(10, 1).repeat_interleave(10, 2)  # 480x640
    rows = [[n, 0, 0, 0, 0, 0, 1] for n in range(len(frames))]
    write_trajectory(folder, frames, np.full(frames.shape[:3], 5), rows)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes `office` (good and frozen), `cut` and `broken` (a missing picture)."""
    root = tmp_path_factory.mktemp("dataset")
    a, b = render_clip(0, 9, 48, 64), render_clip(3, 9, 48, 64)
    write_toy_trajectory(root / "office/Easy/P000", a)
    write_toy_trajectory(root / "office/Easy/P001", dataclasses.replace(a, frames=a.frames[:1].expand(9, -1, -1, -1)))
    assert reject_reason(joined(a, b))
    write_toy_trajectory(root / "cut/Easy/P000", joined(a, b))
    write_toy_trajectory(root / "broken/Hard/P000", a)
    (root / "broken/Hard/P000/image_left/000003_left.png").unlink()
    return root


def test_what_is_dropped_is_written_down_with_its_reason(dataset, tmp_path):
    assert main(["--source", "tartanair", "--root", str(dataset), *SIZE, "--out", str(tmp_path)]) == 0
    shards = ShardSet.open(tmp_path)
    assert [(e.key, e.scene) for e in shards.entries] == [("office-Easy-P000-000000", "office")]
    dropped = {d["unit"]: d for d in map(json.loads, (tmp_path / "dropped.jsonl").read_text().splitlines())}
    assert set(dropped) == {"office/Easy/P001", "cut/Easy/P000", "broken/Hard/P000"}
    assert dropped["office/Easy/P001"]["reason"].startswith("frozen")
    assert dropped["cut/Easy/P000"]["reason"] == "a cut before frame 4"
    assert dropped["cut/Easy/P000"]["key"] == "cut-Easy-P000-000000"
    assert "000003_left.png" in dropped["broken/Hard/P000"]["reason"]


# --- splits and benchmarks


def test_splits_part_the_scenes_and_a_scenes_side_depends_on_its_name_alone():
    def parts(found: list[str], split: str) -> list[str]:
        return split_units("tartanair", found, split, 0.05)

    def scenes(found: list[str]) -> set[str]:
        return {scene_of("tartanair", unit) for unit in found}

    found = [f"scene{n}/Easy/P{k:03d}" for n in range(400) for k in range(3)]
    train, val = parts(found, "train"), parts(found, "val")
    assert sorted(train + val) == sorted(found) and parts(found, "all") == found
    assert not scenes(train) & scenes(val) and scenes(train) | scenes(val) == {f"scene{n}" for n in range(400)}
    assert 8 <= len(scenes(val)) <= 35  # of 20 expected
    assert parts(found[:30], "val") == [unit for unit in val if unit in found[:30]]


def test_the_manifest_says_which_split_it_is(dataset, tmp_path):
    arguments = ["--source", "tartanair", "--root", str(dataset), *SIZE, "--out", str(tmp_path), "--split", "train"]
    assert main(arguments) == 0
    assert ShardSet.open(tmp_path).manifest.split == "train"


def test_benchmarks_are_all_told_and_nothing_else():
    names = [(name, benchmark) for benchmark, listed in units.BENCHMARKS.items() for name in listed.split()]
    assert len({n for n, b in names if b == "sintel"}) == 23 and len({n for n, b in names if b == "tum-dynamics"}) == 8
    for name, benchmark in names:
        assert benchmark_of("/data", name) == benchmark_of("/data", f"deep/{name}/rgb") == benchmark
        assert benchmark_of(f"/data/{name}", ".") == benchmark
    assert benchmark_of("/data", "labels/alley_1.npz") == "sintel"  # one npz
    for name in ("rgbd_bonn_crowd", "rgbd_dataset_freiburg1_desk", "alley_3", "office/Easy/P001"):
        assert benchmark_of("/data", name) == ""


def test_a_manifest_of_the_time_before_scenes_still_opens(undisturbed):
    tree = json.loads((undisturbed / "manifest.json").read_text())
    for name in ("split", "recipe"):
        del tree[name]
    for shard in tree["shards"]:
        for sample in shard["samples"]:
            del sample["scene"], sample["benchmark"]
    manifest = Manifest.from_json(json.dumps(tree))
    assert manifest.split == "all" and not any(s.benchmark for shard in manifest.shards for s in shard.samples)


def test_a_limit_reached_by_several_processes_leaves_no_staging_behind(tmp_path):
    assert main([*TOY, "--limit", "1", "--jobs", "2", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"shard-000000.tar", "manifest.json", "dropped.jsonl"}


def test_a_unit_that_is_begun_after_the_set_is_whole_stages_nothing(undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    plan = Plan(["toy_synthetic_00000000"], 2, None, "raw", "all", {})
    captions = CaptionOptions()
    task = UnitTask(0, plan.units[0], "toy", None, out, plan, 9, None, 16, 32, None, 0.0, frozenset(), captions)
    assert convert_unit(task) == units.UnitResult(0, 0, [])
    assert contents(out) == contents(undisturbed)


def test_shards_of_other_settings_are_no_part_of_the_folder(undisturbed, tmp_path):
    (tmp_path / "shard-000009.tar").write_bytes(b"of a longer run whose staging folder was removed")
    assert main([*TOY, "--out", str(tmp_path)]) == 0
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.parametrize("name", ["plan.json", "unit-0000000.json"])
def test_a_damaged_staging_file_is_named_with_the_remedy(tmp_path, capsys, name):
    assert main([*TOY, "--out", str(tmp_path), "--rank", "0", "--world", "7"]) == 0
    (tmp_path / ".staging" / name).write_text('{"units": [')
    assert main([*TOY, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error and f"remove {tmp_path / '.staging'} to start over" in error


def test_a_list_of_exclusions_that_is_no_text_is_named(tmp_path, capsys):
    (tmp_path / "exclude.txt").write_bytes(b"\xff\xfe\x00")
    assert main([*TOY, "--out", str(tmp_path / "out"), "--exclude", str(tmp_path / "exclude.txt")]) == 2
    assert "exclude.txt: text in UTF-16" in capsys.readouterr().err


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_one_clear_error():
    with pytest.raises(UserError, match="start again to go on, with fewer --jobs"):
        list(run_parallel(die, range(3), jobs=2))


def stall(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_long_wait_is_said(monkeypatch, caplog):
    monkeypatch.setattr(parallel, "QUIET_S", 0.5)
    assert list(run_parallel(stall, [1.5], jobs=2)) == [1.5]
    assert "nothing was finished for 0.5 s" in caplog.text
