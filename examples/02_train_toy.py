"""Train Decoupled LoRA Control on the toy world, then sample with what was trained.

A short run, a few minutes on a CPU: .venv/bin/python examples/02_train_toy.py
Started again it goes on where it was. The whole run, and every other scale, is the same function:
.venv/bin/one4d fit --config configs/dlc.yaml
"""

import argparse
import logging

import torch

from one4d_pl.config import load_config
from one4d_pl.fit import fit
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.scene.scene import save_scene
from one4d_pl.training.checkpoint_files import newest_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/example")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.max_steps=400")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # a yaml, then overrides: everything that a run can be told is in docs/knobs.md
    short = ["train={max_steps: 20, save_every: 20, log_every: 5}", "optim.cooldown_steps=0", "val.every=20"]
    config = load_config(["configs/dlc.yaml"], [f"run_dir={args.out}", *short, *args.overrides])
    code = fit(config)
    if code:
        raise SystemExit(code)  # stopped by a signal; the same command goes on

    checkpoint = newest_checkpoint(config.run_dir)
    assert checkpoint is not None
    pipe = One4DPipeline.from_pretrained(adapters=checkpoint)
    scene = pipe("a blue box on sand", generator=torch.Generator().manual_seed(0))
    save_scene(checkpoint.parents[1] / "scene", scene)
    print(f"trained to {checkpoint}; a scene of it: {checkpoint.parents[1] / 'scene'}")
    print(f"curves: .venv/bin/tensorboard --logdir {config.run_dir}")


if __name__ == "__main__":
    main()
