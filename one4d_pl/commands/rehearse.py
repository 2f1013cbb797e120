"""one4d rehearse --config ...: the configured training step and sampler on a GPU that is not there.

No GPU, no weights, no data: the project's own code and Lightning's Trainer run on fake CUDA tensors, which have a
device, a dtype and a shape but no bytes. Reports what a GPU would have refused (one line with module and file), where
the CPU waits for the GPU, and the memory of every phase beside the planner's. The whole 14B takes two minutes on a CPU,
--blocks 2 half a minute. Needs g++ and a CPU build of torch, or a GPU.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING

from one4d_pl.cluster.signals import end_process
from one4d_pl.commands.command import Command
from one4d_pl.config import ConfigError, load_config
from one4d_pl.models.base_files import sizes_of
from one4d_pl.rehearsal.fake_cuda import load_device

if TYPE_CHECKING:
    from one4d_pl.rehearsal.run import Rehearsal

GIB, GB = 2**30, 1e9
SHOWN = 12  # lines of a list


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="yaml; later files win")
    parser.add_argument("--blocks", type=int, metavar="N", help="of the transformer (default: all): quicker, same code")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _run(args: argparse.Namespace) -> int:
    """Rehearse and print; return the exit code: 1 for a fault."""
    began = time.perf_counter()
    config = load_config(args.config, args.overrides)
    _, settings, _ = sizes_of(config.base.path)
    if args.blocks is not None and not 0 < args.blocks <= int(str(settings["num_layers"])):
        raise ConfigError(f"--blocks: {args.blocks}, need 1 to {settings['num_layers']}, the base's number")
    load_device()  # before torch is imported
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from one4d_pl.rehearsal.run import Fault, rehearse

    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        seen = rehearse(config, args.blocks)
    except Fault as fault:
        print(f"fault: {fault}", file=sys.stderr)
        return 1
    print("\n".join([*report_lines(seen), "", f"rehearsed in {time.perf_counter() - began:.0f} s; no fault"]))
    return 0


def report_lines(seen: Rehearsal) -> list[str]:
    """Format the rehearsal as lines for people."""
    lines = [f"base        {seen.base}, {seen.blocks} blocks"]
    lines += [f"  {name:<16}{words}" for name, words in seen.tensors.items()]
    lines += ["", f"  {'phase':<24}{'peak GiB':>10}{'waits':>8}{'uploads':>9}"]
    for name, phase in seen.phases.items():
        lines.append(f"  {name:<24}{phase.peak / GIB:10.2f}{phase.waits.total():8}{phase.uploads:9}")
    found, planned = seen.step_peak, seen.planned.tensors
    lines += [
        "",
        f"step        peak {found / GIB:.2f} GiB of tensors, the planner says {planned / GIB:.2f} "
        f"({planned / found - 1:+.1%}); one process that holds everything, gradients and moments there",
        f"traffic     {seen.traffic / GB:.3g} GB a block, forward and backward, "
        f"{seen.elementwise / GB:.3g} GB of it outside of products and attention",
        *(f"  {size / seen.blocks / GB:8.3g}  {name}" for name, size in seen.operations.most_common(SHOWN)),
        "",
        "alive at the step's peak, GiB by what made it:",
        *(f"  {size / GIB:8.2f}  {label}" for label, size in seen.at_peak.most_common(SHOWN)),
    ]
    for name, phase in seen.phases.items():
        if phase.waits:
            lines += ["", f"{name}: the CPU waits for the GPU at"]
            lines += [f"  {count:4} x {place}" for place, count in phase.waits.most_common()]
    return lines


# autograd's threads keep using the fake device and would outlive Python, so the process is ended
main = Command("one4d rehearse", __doc__, _add_arguments, _run, end=end_process)
