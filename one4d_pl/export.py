"""python -m one4d_pl.export: an adapter without its optimiser state, from any checkpoint or run folder.

Leaves what training starts from and inference loads: rgb/ and xyz/ in PEFT's format, links, xyz patch embedding, card.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

from one4d_pl.config import ConfigError

log = logging.getLogger("one4d_pl")

DTYPES = ("float32", "bfloat16")


def main(arguments: list[str]) -> int:
    """Parse and export; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m one4d_pl.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint (step-*), or a run folder: its newest checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the adapter folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="on disk; default: as trained")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        size = export(args.checkpoint, args.out, args.dtype)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log.info("adapter: %s (%.1f MB)", args.out, size / 1e6)
    return 0


def export(checkpoint: Path, out: Path, dtype: str) -> int:
    """Write the adapter of `checkpoint` to `out`, atomically; returns its size in bytes."""
    import torch
    from safetensors.torch import load_file, save_file

    from one4d_pl.models.adapters import AdapterCard, adapter_files
    from one4d_pl.training.checkpoint import newest_checkpoint

    folder = checkpoint if (checkpoint / "card.json").is_file() else newest_checkpoint(str(checkpoint))
    if folder is None:
        raise ConfigError(f"{checkpoint}: neither a checkpoint (no card.json) nor a run folder with checkpoints/step-*")
    if out.exists():
        raise ConfigError(f"--out: {out} exists; name a new folder")
    AdapterCard.read(folder)
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for file in adapter_files(folder):
            target = staging / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix == ".safetensors":
                cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(folder / file).items()}
                save_file(cast, target)
            else:
                shutil.copyfile(folder / file, target)
        size = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
        staging.rename(out)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out} ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
