"""one4d export: a scene in other programs' formats, or an adapter without its optimiser state.

From a scene folder: point clouds (.ply, .glb), COLMAP, nerfstudio, a TUM trajectory, 16-bit depth; a folder each.
From a checkpoint or run folder: what training starts from and inference loads: rgb/ and xyz/ in PEFT's format, links,
xyz patch embedding, card; on request the rgb and xyz LoRA as diffusers or Wan's own tools read them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from one4d_pl.commands.command import Command
from one4d_pl.config import ConfigError
from one4d_pl.errors import reading
from one4d_pl.files import check_folder, whole_folder

log = logging.getLogger("one4d_pl")

DTYPES = ("float32", "bfloat16")
LAYOUTS = ("diffusers", "wan")  # those of models.lora_formats, which imports torch
FORMATS = ("ply", "glb", "colmap", "nerfstudio", "tum", "depth16")  # those of scene.exports, which imports torch


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", type=Path, help="a scene folder; a checkpoint (step-*); or a run folder: its newest checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must not exist")
    adapter = parser.add_argument_group("of an adapter")
    adapter.add_argument("--dtype", choices=DTYPES, help="on disk; default: as trained")
    adapter.add_argument(
        "--lora-for",
        nargs="+",
        choices=LAYOUTS,
        default=[],
        help="also one file per branch for diffusers' load_lora_weights, or under Wan's own names; the LoRA alone",
    )
    scene = parser.add_argument_group("of a scene")
    scene.add_argument("--formats", nargs="+", choices=FORMATS, metavar="FORMAT", help=f"default: {' '.join(FORMATS)}")
    scene.add_argument("--keep-flying-points", action="store_true", help="keep points between two surfaces, at edges")
    scene.add_argument(
        "--points", type=int, help="most points of a cloud of all frames, evenly thinned; default: 500000"
    )


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from one4d_pl.scene.scene import is_scene

    if is_scene(args.what):
        if args.dtype is not None or args.lora_for:
            raise ConfigError(f"--dtype, --lora-for: {args.what} is a scene, they belong to adapters")
        if args.points is not None and args.points < 1:
            raise ConfigError(f"--points: {args.points}, need 1 or more")
        _check_new(args.out)
        from one4d_pl.scene.exports import POINT_LIMIT, export_scene
        from one4d_pl.scene.scene import open_scene

        formats = tuple(dict.fromkeys(args.formats or FORMATS))
        export_scene(open_scene(args.what), args.out, formats, args.keep_flying_points, args.points or POINT_LIMIT)
        log.info("scene: %s", args.out)
    else:
        if args.formats or args.keep_flying_points or args.points:
            raise ConfigError(f"--formats, --keep-flying-points, --points: {args.what} is no scene (no scene.json)")
        size = export(args.what, args.out, args.dtype or DTYPES[0], args.lora_for)
        log.info("adapter: %s (%.1f MB)", args.out, size / 1e6)


def _check_new(out: Path) -> None:
    check_folder(out, "--out")
    if out.exists():
        raise ConfigError(f"--out: {out} exists; name a new folder")


def export(checkpoint: Path, out: Path, dtype: str, lora_for: Sequence[str]) -> int:
    """Write the adapter of `checkpoint` to `out`, atomically; return its size in bytes."""
    import torch
    from safetensors.torch import load_file, save_file

    from one4d_pl.models.adapters import AdapterCard, adapter_files, check_complete
    from one4d_pl.models.lora_formats import save_lora
    from one4d_pl.training.checkpoint_files import newest_checkpoint
    from one4d_pl.types import MODALITIES

    folder = checkpoint if (checkpoint / "card.json").is_file() else newest_checkpoint(str(checkpoint))
    if folder is None:
        raise ConfigError(
            f"{checkpoint}: neither a checkpoint (card.json) nor a scene (scene.json) nor a run folder with "
            "checkpoints/step-*"
        )
    _check_new(out)
    card = AdapterCard.read(folder)
    if lora_for and card.coupling != "decoupled":
        raise ConfigError(f"--lora-for: {folder} couples by {card.coupling}, it has no LoRA of the frames alone")
    check_complete(folder, card)
    with whole_folder(out) as staging:
        for file in adapter_files(folder):
            target = staging / file
            target.parent.mkdir(parents=True, exist_ok=True)
            with reading(folder / file):
                content = (folder / file).read_bytes() if target.suffix == ".json" else load_file(folder / file)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                save_file({name: tensor.to(getattr(torch, dtype)) for name, tensor in content.items()}, target)
        for layout in dict.fromkeys(lora_for):
            for modality in MODALITIES:
                save_lora(staging, modality, layout, staging / f"{modality}_lora_{layout}.safetensors")
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


main = Command("one4d export", __doc__, _add_arguments, _run)
