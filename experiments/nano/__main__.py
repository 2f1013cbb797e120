"""python -m experiments.nano: re-show ten of the paper's claims at laptop scale; nine core-hours, or less on a GPU.

Trains and measures the runs of experiments.py beside it, as many at a time as there are cores, each in a folder of
its own below --out; a run that was interrupted goes on, a finished one is kept. Writes report.md and its figures after
every run, so that there is always something to read.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from experiments.nano.experiments import EXPERIMENTS, RUNS, Experiment, Run
from experiments.nano.work import CLIPS, Plan, can_start, is_finished, work
from one4d_pl.cluster.signals import end_with_parent
from one4d_pl.commands.command import Command
from one4d_pl.config import ConfigError
from one4d_pl.files import check_folder
from one4d_pl.interrupts import at_interrupt, end, uninterrupted
from one4d_pl.progress import Progress

log = logging.getLogger("one4d_pl")

MINUTES = {"train": 31, "sample": 2, "references": 2}  # of a run, on one core with bfloat16
RUN_TIMEOUT_S = 6 * 3600
POLL_S = 1.0
STOP_TIMEOUT_S = 60.0
PARENT_VARIABLE = "ONE4D_NANO_PID"  # the parent's pid, for the processes of single runs


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [experiment.name for experiment in EXPERIMENTS]
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/nano"), help="folder of runs and report (default %(default)s)")
    add("--only", action="append", choices=names, metavar="NAME", help=f"of {', '.join(names)}; may be repeated")
    add("--config", action="append", metavar="FILE", help="yaml; default: configs/nano.yaml")
    add("--clips", type=int, default=CLIPS, help="held-out clips to measure on (default %(default)s)")
    add("--seeds", type=int, help="at most so many per run; with one no verdict can be given")
    cores = len(os.sched_getaffinity(0))
    add("--jobs", type=int, default=cores, help="runs at a time (default: a core each); 0: in this process")
    add("--report-only", action="store_true", help="write the report of what is finished")
    add("--run", metavar="NAME:SEED", help="do this one run and nothing else")
    add("overrides", nargs="*", metavar="section.key=value", help="of every run, e.g. train.max_steps=20")


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fit does
    plan = Plan(args.out, tuple(args.config or Plan.configs), tuple(args.overrides), args.clips)
    if args.clips < 2 or args.jobs < 0 or (args.seeds is not None and args.seeds < 1):
        raise ConfigError("--clips, --seeds, --jobs: need at least 2, 1 and 0")
    check_folder(args.out, "--out")
    if args.run:
        work(plan, *_parse_run(args.run))
        return
    # checked now, and not after hours of training
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "scipy")):
        raise ConfigError("the report needs matplotlib and scipy: pip install 'one4d_pl[dev]'")
    experiments = [experiment for experiment in EXPERIMENTS if not args.only or experiment.name in args.only]
    from experiments.nano.report import write_report

    if not args.report_only:
        _run_all(plan, jobs_of(experiments, args.seeds), args.jobs, lambda: write_report(plan))
    path = write_report(plan)
    print(path.read_text())
    log.info("report: %s", path)


def jobs_of(experiments: list[Experiment], seeds: int | None = None) -> list[tuple[Run, int]]:
    """List every run of the experiments once per seed. First seeds come first, so that an early report has all rows."""
    names = list(dict.fromkeys(name for experiment in experiments for name in experiment.runs))
    jobs = [(RUNS[name], seed) for name in names for seed in range(min(RUNS[name].seeds, seeds or RUNS[name].seeds))]
    return sorted(jobs, key=lambda job: job[1])


def _parse_run(text: str) -> tuple[Run, int]:
    name, _, seed = text.partition(":")
    if name not in RUNS or not seed.isdigit():
        raise ConfigError(f"--run: {text!r}, need NAME:SEED with a name of {', '.join(RUNS)}")
    return RUNS[name], int(seed)


def _run_all(plan: Plan, jobs: list[tuple[Run, int]], at_once: int, on_done: Callable[[], object]) -> None:
    """Do all jobs, `at_once` at a time (0 = in this process). ConfigError where one fails or takes too long."""
    waiting = [job for job in jobs if not is_finished(plan, *job)]
    hours = sum(MINUTES[run.kind] for run, _ in waiting) / 60
    log.info(
        "%d runs, %d of them finished; the others take about %.1f core-hours where the processor has bfloat16, %d at a "
        "time; logs: %s/*/log.txt",
        *(len(jobs), len(jobs) - len(waiting), hours, max(1, at_once), plan.out),
    )
    running: dict[tuple[Run, int], tuple[subprocess.Popen[bytes], float]] = {}
    stop = at_interrupt(lambda: _stop([process for process, _ in running.values()]))
    with stop, Progress(total=len(waiting), desc="runs", unit="run") as bar:
        try:
            while waiting or running:
                while len(running) < max(1, at_once) and (job := _next(plan, waiting, idle=not running)):
                    waiting.remove(job)
                    if at_once == 0:
                        work(plan, *job)
                        bar.update()
                        on_done()
                        continue
                    with uninterrupted():
                        running[job] = (_start(plan, *job), time.monotonic())
                for job, (process, began) in list(running.items()):
                    if process.poll() is None:
                        if time.monotonic() - began > RUN_TIMEOUT_S:
                            raise ConfigError(
                                f"{plan.folder(*job)}: not done after {RUN_TIMEOUT_S} s; see log.txt there"
                            )
                        continue
                    del running[job]
                    if process.returncode:
                        raise ConfigError(f"{plan.folder(*job)}: exit code {process.returncode}; see log.txt there")
                    bar.update()
                    on_done()
                time.sleep(POLL_S if running else 0)
        finally:
            _stop([process for process, _ in running.values()])


def _next(plan: Plan, waiting: list[tuple[Run, int]], idle: bool) -> tuple[Run, int] | None:
    """Return the first run that can start; if none will ever, the first, which says what it lacks."""
    return next((job for job in waiting if can_start(plan, *job)), waiting[0] if waiting and idle else None)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(STOP_TIMEOUT_S)


def _start(plan: Plan, run: Run, seed: int) -> subprocess.Popen[bytes]:
    folder = plan.folder(run, seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.nano", "--run", f"{run.name}:{seed}", "--out", str(plan.out)]
    command += ["--clips", str(plan.clips)]
    command += [word for path in plan.configs for word in ("--config", path)]
    with (folder / "log.txt").open("ab") as output:
        return subprocess.Popen(
            [*command, *plan.overrides],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"OMP_NUM_THREADS": "1", **os.environ, PARENT_VARIABLE: str(os.getpid())},  # a core each
        )


main = Command("python -m experiments.nano", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    if PARENT_VARIABLE in os.environ:  # a single run: SIGTERM, from its parent too, saves its state
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        end_with_parent(int(os.environ.pop(PARENT_VARIABLE)), signal.SIGTERM)
    else:  # the parent stops its runs, which would otherwise go on without it
        signal.signal(signal.SIGTERM, lambda number, frame: end("stopped; the same command goes on from there"))
    main.run_process()
