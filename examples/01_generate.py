"""Make 4D scenes of a prompt, of one picture and of a whole video, and export them.

Offline, on a CPU, in seconds: .venv/bin/python examples/01_generate.py
With adapters of your own: --adapters runs/dlc/checkpoints/step-00000400
"""

import argparse
from pathlib import Path

import torch

from one4d_pl.config import DEMO_ADAPTERS
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.scene.exports import export_scene
from one4d_pl.scene.scene import Scene, save_scene


def describe(name: str, scene: Scene, out: Path) -> None:
    """Store a scene and say what came out of it."""
    save_scene(out / name, scene)
    moved = (scene.cam2world[-1, :3, 3] - scene.cam2world[0, :3, 3]).norm()
    near = scene.depth[scene.valid].median() if scene.valid.any() else torch.nan
    print(f"{name}: {scene.num_frames} frames, median depth {near:.2f}, the camera moved by {moved:.2f}: {out / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=DEMO_ADAPTERS)
    parser.add_argument("--prompt", default="a red ball rolls over grass")
    parser.add_argument("--video", type=Path, help="any video; default: the one that the prompt gave")
    parser.add_argument("--steps", type=int, help="default: as the adapters' card says")
    parser.add_argument("--out", type=Path, default=Path("scenes"))
    args = parser.parse_args()

    pipe = One4DPipeline.from_pretrained(adapters=args.adapters)  # its base is named in the card

    text = pipe(args.prompt, steps=args.steps, generator=torch.Generator().manual_seed(0))
    describe("text", text, args.out)

    image = pipe(args.prompt, frames={0: text.frames[0].numpy()}, steps=args.steps)  # or a path: {0: "photo.jpg"}
    describe("image", image, args.out)

    video = pipe(video=args.video or args.out / "text" / "rgb.mp4", steps=args.steps)
    describe("video", video, args.out)

    exported = args.out / "exported"
    if not exported.exists():  # nothing is overwritten
        export_scene(video, exported, ("ply", "colmap"))
    print(f"points: {exported / 'ply'}; look at a scene: one4d view {args.out / 'video'}")


if __name__ == "__main__":
    main()
