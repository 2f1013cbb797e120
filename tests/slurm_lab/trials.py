"""Runs of slurm/train_8node.sh on the lab, and what is done to them; each trial ends in a row of a table."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm_lab.lab import Lab
from tests.slurm_lab.tiny_run import last_step, losses

REPO = Path(__file__).parents[2]
STRATEGIES = {
    "ddp": "train.strategy=ddp",
    "zero2": "train.strategy=deepspeed train.zero_stage=2",
    "zero3": "train.strategy=deepspeed train.zero_stage=3",
}
TOLERANCE = 1e-6  # of every loss of every step
START_S = 300  # from the queue to the first step, eight imports on two busy cores included


@dataclass
class Row:
    """What a trial showed."""

    trial: str
    strategy: str
    starts: int
    seconds: float
    difference: float  # largest, of any loss of any step, to the undisturbed run
    remarks: list[str] = field(default_factory=list)  # what should not be

    def __str__(self) -> str:
        verdict = "; ".join(self.remarks) or "ok"
        shown = (self.trial, self.strategy, self.starts, f"{self.seconds:.0f} s", f"{self.difference:.1e}", verdict)
        return "| " + " | ".join(map(str, shown)) + " |"


HEADER = "| trial | strategy | starts | time | largest difference of a loss | verdict |\n|---|---|---|---|---|---|"


class Trials:
    """Trials of one strategy in `folder`; the undisturbed run comes first.

    Args:
        lab: the running cluster.
        folder: for run folders and job logs.
        lab_yaml: of `tiny_run.prepare`.
        strategy: one of STRATEGIES.
        steps: of the undisturbed run; the others may be shorter.
    """

    def __init__(self, lab: Lab, folder: Path, lab_yaml: Path, strategy: str, steps: int, seed: int = 0) -> None:
        self.lab, self.folder, self.lab_yaml, self.strategy, self.steps = lab, folder, lab_yaml, strategy, steps
        self.chance = random.Random(seed)
        self.expected: dict[tuple[int, str], float] = {}

    def undisturbed(self) -> Row:
        """The run that the others are compared with."""
        row = self._trial("undisturbed", self.steps, lambda job, run_dir: None)
        self.expected = losses(self.folder / f"{self.strategy}-undisturbed")
        return row

    def usr1(self, times: int, steps: int) -> list[Row]:
        """USR1 to a random rank at random times, imports and the pre-flight included; as many runs as that takes."""
        rows, left = [], times

        def disturb(job: int, run_dir: Path) -> None:
            nonlocal left
            while left and self._sleep_in_job(job, self.chance.uniform(5, 90)):
                ranks = self.lab.ranks() or self.lab.ranks("one4d_pl")
                if not ranks:
                    continue
                rank = self.chance.choice(sorted(ranks))
                with contextlib.suppress(ProcessLookupError):
                    self._say(f"USR1 to rank {rank} at step {last_step(run_dir)}+")
                    os.kill(ranks[rank], signal.SIGUSR1)
                    left -= 1

        while left:
            before = left
            row = self._trial(f"USR1 {len(rows)}", steps, disturb)
            row.trial = f"USR1 x{before - left} at random times to random ranks"
            rows.append(row)
        return rows

    def time_limit(self, times: int, steps: int) -> Row:
        """SLURM's time limit, met `times` times, each once the run has trained further; then it is far off again."""

        def disturb(job: int, run_dir: Path) -> None:
            reached = 0
            for hit in range(1, times + 1):
                self._wait_for_training(job, run_dir, beyond=reached)
                hours, minutes, seconds = (int(part) for part in self.lab.job(job)["RunTime"].split(":"))
                limit = 60 * hours + minutes + (1 if seconds < 20 else 2)  # 40 to 100 s from now, at any speed
                self._say(f"time limit {hit}: {limit} minutes at step {last_step(run_dir)}+")
                self.lab.command("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
                self._wait_for_restart(job, hit)
                self.lab.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # a start takes its time
                reached = last_step(run_dir)

        # SLURM looks every 30 s and signals up to that much earlier
        row = self._trial("time limit", steps, disturb, "--signal=B:USR1@90", starts_at_least=times + 1)
        row.trial = f"time limit x{row.starts - 1}"
        return row

    def rank_killed(self, steps: int) -> Row:
        """SIGKILL to a random rank in training."""

        def disturb(job: int, run_dir: Path) -> None:
            self._wait_for_training(job, run_dir)
            rank, pid = self.chance.choice(sorted(self.lab.ranks().items()))
            self._say(f"KILL to rank {rank}")
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            while self.lab.ranks():
                time.sleep(0.2)
            self._say(f"every other rank was down after {time.monotonic() - began:.1f} s")

        return self._trial("rank killed", steps, disturb, starts_at_least=2)

    def signalled_and_killed(self, steps: int) -> Row:
        """One USR1 in training, then one killed rank, in the same run."""

        def disturb(job: int, run_dir: Path) -> None:
            self._wait_for_training(job, run_dir)
            os.kill(self.lab.ranks()[3], signal.SIGUSR1)
            self._wait_for_restart(job, 1)
            reached = last_step(run_dir)
            assert reached, "USR1 left no checkpoint"
            self._wait_for_training(job, run_dir, beyond=reached)
            os.kill(self.lab.ranks()[5], signal.SIGKILL)

        return self._trial("USR1 and rank killed", steps, disturb, starts_at_least=3)

    def node_killed(self, steps: int, node: str) -> Row:
        """A node's slurmd and tasks by SIGKILL, revived once SLURM has given it up."""

        def disturb(job: int, run_dir: Path) -> None:
            self._wait_for_training(job, run_dir)
            self._say(f"{node} dies")
            self.lab.kill_node(node)
            self._wait_for_restart(job, 1)
            self.lab.wait(job, 120, lambda _: self.lab.state(node).startswith("down"))
            self._say(f"{node} comes back")
            self.lab.revive(node)

        return self._trial(f"{node} killed and revived", steps, disturb, starts_at_least=2)

    def scancelled(self, steps: int) -> Row:
        """scancel in training: the job is over and does not come back; submitted again, the run goes on."""
        remarks: list[str] = []

        def disturb(job: int, run_dir: Path) -> None:
            self._wait_for_training(job, run_dir)
            self.lab.command("scancel", str(job))
            state = self.lab.wait(job, 60)
            self._say(f"scancel: {state}, checkpoint of step {last_step(run_dir)}")
            remarks.extend(f"after scancel: {remark}" for remark in self._leftovers(run_dir))
            if state != "CANCELLED":
                remarks.append(f"scancel gave {state}")

        row = self._trial("scancel", steps, disturb, resubmit=True)
        row.remarks += remarks
        row.trial = "scancel, submitted again"
        return row

    def refused(self) -> Row:
        """A disk too small for the checkpoints: one line, exit code 2, no requeue."""
        run_dir, began = self.folder / f"{self.strategy}-refused", time.monotonic()
        job = self._submit(run_dir, 1, more="train.keep_last=1000000000")
        self.lab.wait(job, START_S)
        shown, said = self.lab.job(job), Path(f"{run_dir}.out").read_text().splitlines()
        remarks = self._leftovers(run_dir)
        if (shown["JobState"], shown["ExitCode"], shown["Restarts"]) != ("FAILED", "2:0", "0"):
            remarks.append(f"{shown['JobState']} {shown['ExitCode']} after {shown['Restarts']} restarts")
        if sum(line.startswith("error: run_dir: ") and "GB free" in line for line in said) != 1:
            remarks.append(f"not one line: {self._log_end(run_dir)}")
        return Row("refused by the pre-flight", self.strategy, 1, time.monotonic() - began, 0.0, remarks)

    def _trial(
        self,
        name: str,
        steps: int,
        disturb: Callable[[int, Path], None],
        *sbatch: str,
        starts_at_least: int = 1,
        resubmit: bool = False,
    ) -> Row:
        run_dir = self.folder / f"{self.strategy}-{name.replace(' ', '-')}"
        began = time.monotonic()
        self._say(f"{name}: {steps} steps")
        job = self._submit(run_dir, steps, *sbatch)
        remarks = []
        try:
            disturb(job, run_dir)
        except (RuntimeError, LookupError, OSError) as error:  # the job ended before it could be disturbed
            remarks.append(f"not disturbed: {str(error).splitlines()[0]}")
        if resubmit:
            job = self._submit(run_dir, steps, *sbatch)
        state = self.lab.wait(job, 3 * START_S + 6 * steps)
        starts = 1 + int(self.lab.job(job)["Restarts"]) + resubmit
        remarks += self._leftovers(run_dir)
        if state != "COMPLETED":
            remarks.append(f"{state}: {self._log_end(run_dir)}")
        if starts < starts_at_least:
            remarks.append(f"{starts} starts, expected {starts_at_least} or more")
        found = losses(run_dir)
        expected = {key: value for key, value in (self.expected or found).items() if key[0] <= steps}
        if sorted(found) != sorted(expected) or len(found) != 2 * steps:
            remarks.append(f"{len(found)} losses, expected {2 * steps}")
        difference = max((abs(found[key] - expected[key]) for key in found if key in expected), default=float("inf"))
        if difference > TOLERANCE:
            remarks.append(f"losses differ by more than {TOLERANCE:.0e}")
        row = Row(name, self.strategy, starts, time.monotonic() - began, difference, remarks)
        self._say(str(row))
        return row

    def _submit(self, run_dir: Path, steps: int, *sbatch: str, more: str = "") -> int:
        overrides = f"{STRATEGIES[self.strategy]} train.max_steps={steps} {more}"
        return self.lab.submit(
            "--time=60", f"--output={run_dir}.out", *sbatch, "slurm/train_8node.sh", cwd=REPO,
            GPUS_PER_NODE="1", CONFIGS=f"configs/dlc.yaml {self.lab_yaml}", OVERRIDES=overrides, RUN_DIR=str(run_dir),
            VENV=sys.prefix, NCCL_INTERFACE="lo", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PREFLIGHT_TIMEOUT="180",
        )  # fmt: skip

    def _wait_for_training(self, job: int, run_dir: Path, beyond: int = 0) -> None:
        """Until a new checkpoint lies there and a little more has been trained."""
        self.lab.wait(
            job, 2 * START_S, lambda _: last_step(run_dir) > beyond and len(self.lab.ranks()) == self.lab.nodes
        )
        time.sleep(self.chance.uniform(0, 2))

    def _wait_for_restart(self, job: int, restarts: int) -> None:
        self.lab.wait(job, 240, lambda shown: int(shown["Restarts"]) >= restarts)

    def _sleep_in_job(self, job: int, seconds: float) -> bool:
        """Sleep from now on, the queue not counted; False once the job has ended."""
        until: list[float] = []

        def over(shown: dict[str, str]) -> bool:
            if shown["JobState"] == "RUNNING" and not until:
                until.append(time.monotonic() + seconds)
            return bool(until) and time.monotonic() > until[0]

        self.lab.wait(job, START_S + seconds, over)
        return self.lab.job(job)["JobState"] in ("RUNNING", "PENDING")

    def _leftovers(self, run_dir: Path) -> list[str]:
        """Processes of jobs that have ended, half-written files, jobs in the queue."""
        for _ in range(40):
            if not self.lab.processes() and not self.lab.command("squeue", "-h"):
                break
            time.sleep(0.5)
        remarks = [f"orphan {pid} ({env.get('SLURM_PROCID', '?')})" for pid, env in self.lab.processes().items()]
        remarks += [f"in the queue: {line}" for line in self.lab.command("squeue", "-h").splitlines()]
        halves = [path for path in run_dir.rglob(".*") if path.is_file() or path.is_dir()] + list(
            run_dir.rglob("*.tmp")
        )
        return remarks + [f"left over: {path.relative_to(run_dir)}" for path in sorted(set(halves))]

    def _log_end(self, run_dir: Path) -> str:
        lines = re.split(r"[\r\n]+", Path(f"{run_dir}.out").read_text(errors="replace").strip())
        return " / ".join(lines[-2:])

    def _say(self, words: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.strategy}: {words}", file=sys.stderr, flush=True)
