"""one4d preflight --config ...: what would end a run in an hour, found in a minute, on every node.

Under srun every rank starts it (slurm/train_8node.sh does, before training); alone it checks one machine.

1. each rank: number of processes, GPUs; each node: the driver, the base's files and fingerprint, one sample
   of every source.
2. the ranks meet at MASTER_ADDR:MASTER_PORT and hand what they saw to rank 0, which compares weights and versions,
   and looks at the run folder and the disk.
3. an all-reduce of all ranks, gloo on CPUs and NCCL on GPUs.

Every fault is one line on rank 0, exit code 2. A stage that hangs is named and ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from one4d_pl.cluster.readiness import (
    Place,
    Report,
    check_world,
    differences,
    faults_of,
    look,
    refuse_absent_packages,
    run_faults,
)
from one4d_pl.commands.command import USER_ERROR, Command
from one4d_pl.config import Config, ConfigError, check_paths, load_config

if TYPE_CHECKING:
    from torch.distributed import Store

ALL_REDUCE_FLOATS = 1 << 22


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="yaml; later files win")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for each stage (default 60)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _run(args: argparse.Namespace) -> int:
    """Check, print a line per fault, and return the exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a refused connection logs forty lines
    place = Place.from_environment()
    config = load_config(args.config, args.overrides)
    check_paths(config)
    refuse_absent_packages(config)
    check_world(config, place)
    faults = preflight(config, place, args.timeout)
    if place.rank and faults:
        print("pre-flight: rank 0 tells what is wrong", file=sys.stderr)
        return USER_ERROR
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr, flush=True)
    return USER_ERROR if faults else 0


class Deadline:
    """A timer that ends the process with one line when a stage lasts too long.

    Nothing gentler stops a hang in a driver or a file system.
    """

    def __init__(self, seconds: float, node: str) -> None:
        self.seconds, self.node, self.timer = seconds, node, threading.Timer(0, lambda: None)

    def begin(self, stage: str) -> None:
        """Stop the clock of the stage before and start that of this one."""
        self.timer.cancel()
        self.timer = threading.Timer(self.seconds, self._expire, (stage,))
        self.timer.daemon = True
        self.timer.start()

    def end(self) -> None:
        self.timer.cancel()

    def _expire(self, stage: str) -> None:
        print(f"error: {self.node}: {stage}: not done after {self.seconds:.0f} s", file=sys.stderr, flush=True)
        os._exit(2)


def preflight(config: Config, place: Place, seconds: float) -> list[str]:
    """Collect every fault that any rank found. The list is the same on every rank, and [] if the run may start."""
    deadline = Deadline(2 * seconds + 10, place.node)  # after the stage's own timeout, whose error says more
    deadline.begin("meeting the other ranks")
    probe = Path(config.run_dir) / f".preflight-{uuid.uuid4().hex[:12]}"
    try:
        store = meet(place, seconds)
        if place.rank == 0:
            store.set("probe", _write_probe(probe))
        deadline.begin("reading weights and samples")
        report = look(config, place, Path(store.get("probe").decode()))
        faults = share(report, place, store, seconds, lambda: run_faults(config))
        if not faults:
            deadline.begin("all-reduce (if it is the network: NCCL_INTERFACE in slurm/env.sh)")
            faults = all_reduce(place, store, seconds)
        _leave_store(place, store)
        return faults
    finally:
        deadline.end()
        with contextlib.suppress(OSError):
            probe.unlink()


def meet(place: Place, seconds: float) -> Store:
    """Open a store that all ranks reach; ConfigError names an address that is out of reach."""
    from torch.distributed import DistNetworkError, TCPStore

    where, timeout = f"{place.address}:{place.port}", timedelta(seconds=seconds)
    try:
        return TCPStore(
            place.address, place.port, place.world, place.rank == 0, timeout=timeout, wait_for_workers=False
        )
    except DistNetworkError as error:
        if place.rank == 0 and "EADDRINUSE" in str(error):
            raise ConfigError(
                f"MASTER_PORT: {place.port} is in use on {place.node}; unset it or choose another"
            ) from None
        raise ConfigError(
            f"MASTER_ADDR: rank {place.rank} on {place.node} does not reach rank 0 at {where} within {seconds:.0f} s"
        ) from None


def share(
    report: Report, place: Place, store: Store, seconds: float, more_faults: Callable[[], list[str]]
) -> list[str]:
    """Hand the report to rank 0 and return the faults of the whole job.

    Rank 0 compares all reports and adds `more_faults`.
    """
    store.set(f"report/{place.rank}", json.dumps(asdict(report)))
    if place.rank == 0:
        keys = [f"report/{rank}" for rank in range(place.world)]
        try:
            store.wait(keys, timedelta(seconds=seconds))
            reports = [Report(**json.loads(store.get(key))) for key in keys]
            faults = faults_of(reports) + differences(reports) + more_faults()
        except RuntimeError:  # DistStoreError: the time is over
            absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            faults = [
                f"ranks {', '.join(absent)} of {place.world} have not reported after {seconds:.0f} s; "
                "their own logs (preflight-<rank>.log) tell why"
            ]
        store.set("verdict", json.dumps(faults))
    return json.loads(store.get("verdict"))


def all_reduce(place: Place, store: Store, seconds: float) -> list[str]:
    """Sum ones over all ranks on the device that will train; return the faults, or []."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", place.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("all-reduce", store),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=seconds),
            device_id=device if device.type == "cuda" else None,
        )
        ones = torch.ones(ALL_REDUCE_FLOATS, device=device)
        dist.all_reduce(ones)  # this one also connects, so the next is timed
        began = time.perf_counter()
        dist.all_reduce(ones)
        total = ones.mean().item()
        took = time.perf_counter() - began
        dist.destroy_process_group()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        return [f"all-reduce with {backend} on {place.node}: {first}; see NCCL_INTERFACE in slurm/env.sh"]
    if total != place.world**2:
        return [f"all-reduce with {backend} on {place.node}: two sums of ones over {place.world} ranks gave {total:g}"]
    if place.rank == 0:
        size = ones.numel() * ones.element_size() / 2**20
        print(f"pre-flight: {place.world} ranks on {place.nodes} nodes, all-reduce of {size:.0f} MiB {took:.3f} s")
    return []


def _write_probe(probe: Path) -> str:
    """Write rank 0's file, which every node must see; return its path."""
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write to {probe.parent} ({error.strerror})") from None
    return str(probe.resolve())


def _leave_store(place: Place, store: Store) -> None:
    """Leave the store; rank 0, which holds it, waits up to five seconds for the others."""
    store.set(f"parted/{place.rank}", "")
    if place.rank == 0:
        with contextlib.suppress(RuntimeError):
            store.wait([f"parted/{rank}" for rank in range(place.world)], timedelta(seconds=5))


main = Command("one4d preflight", __doc__, _add_arguments, _run)
