"""Turn clips of your own into shards, check them, and train on them.

What a clip needs is in data_prep/sources/generic.py: frames, depth or pointmaps, intrinsics and
cameras, as arrays in one .npz each. Here rendered clips stand for yours:
.venv/bin/python examples/03_own_data.py
"""

import argparse
import logging
from pathlib import Path

import numpy as np

from data_prep.check_shards import main as check_shards
from data_prep.write_shards import main as write_shards
from one4d_pl.config import load_config
from one4d_pl.fit import fit
from one4d_pl.toy.world import render_clip


def write_clip(path: Path, seed: int) -> None:
    """Write one clip as any labeler's output could be written."""
    clip = render_clip(seed, num_frames=9, height=48, width=64)
    np.savez(
        path,
        frames=clip.frames.numpy(),  # [T, H, W, 3] uint8
        depth=clip.depth.numpy(),  # [T, H, W] z in the camera, any unit; +inf = sky
        intrinsics=clip.intrinsics.numpy(),  # [T, 3, 3] pixels, centres at +0.5
        cam2world=clip.cam2world.numpy(),  # [T, 4, 4] OpenCV axes, unit of the depth
        fps=12.0,
        licence="CC0-1.0",  # goes into the card of every adapter that trains on it
        caption=clip.caption,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/own_data"))
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.max_steps=400")
    args = parser.parse_args()
    clips, shards = args.out / "clips", args.out / "shards"
    clips.mkdir(parents=True, exist_ok=True)
    for seed in range(args.clips):
        write_clip(clips / f"clip_{seed:04d}.npz", seed)
    size = ["--num-frames", "9", "--height", "48", "--width", "64"]  # Wan's own: 81 352 624
    failed = write_shards(["--source", "generic", "--root", str(clips), "--out", str(shards), *size])
    if failed or check_shards([str(shards), "--vae-clips", "0"]):  # geometry, cameras, conventions
        raise SystemExit("the lines above say what is wrong")

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    own = [f"data.sources=[{{path: {shards}}}]", f"data.val_sources=[{{path: {shards}}}]", "data.toy=null"]
    short = ["train={max_steps: 10, log_every: 5}", "optim.cooldown_steps=0", "val={every: 10, clips: 4}"]
    config = load_config(["configs/dlc.yaml"], [f"run_dir={args.out / 'run'}", *own, *short, *args.overrides])
    raise SystemExit(fit(config))


if __name__ == "__main__":
    main()
