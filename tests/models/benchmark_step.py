"""A training step of configs/dlc.yaml on one core of this CPU, as torch runs it by itself and as `fit` runs it.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/models/benchmark_step.py

Once in bfloat16, where the processor has it, and once in float32 under AVX2 emulation, as on a laptop, in a process of
its own. Before: torch's fused attention, nothing compiled, captions of up to 192 bytes as for the tiny base until 0.2.
Text: captions of as many tokens as today's. Attention: with what `training_attention` chooses. Compiled: the same with
`train.compile`. The ways take turns, each with its own copy of the network; losses are beside those of `text`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from one4d_pl.config import Config, load_config
from one4d_pl.models.coupling import couple
from one4d_pl.models.precision import autocast, can_compile, describe_precision, training_attention, uses_bfloat16
from one4d_pl.models.transformer import CoupledTransformer
from one4d_pl.models.wan import load_transformer
from one4d_pl.training.optim import build_optimizer
from tests.conftest import REPO

CPU = torch.device("cpu")
LAPTOP = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
TEXT_DIM, CHANNELS = 96, 16
TOKENS_BEFORE = 192


@dataclass
class Way:
    """One way to run the step, and what it took."""

    attention: str
    compiled: bool
    tokens: int  # of a caption
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # CPU seconds; the first holds the compilation

    def build(self, config: Config) -> None:
        """The shipped base with an adapter that is on its way, so that every part of it has gradients."""
        base = load_transformer(config.base.path, config.base.dtype, CPU)
        self.transformer: CoupledTransformer = couple(base, config.dlc, seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.transformer.trainable_parameters():
            if ".lora_B." in name or name.startswith("links."):
                nn.init.normal_(parameter, std=0.02, generator=generator)
        self.transformer.set_attention(self.attention)
        if self.compiled:
            self.transformer.compile_blocks()
        self.optimizer = build_optimizer(self.transformer, config.optim)

    def step(self, config: Config, batch: tuple[Tensor, ...]) -> None:
        latents, condition, sigma, text, velocity = batch
        text = text[:, : self.tokens]
        start = time.process_time()
        with autocast(uses_bfloat16(config, CPU), CPU):
            loss = (self.transformer(latents, condition, sigma, text, None) - velocity).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - start)
        self.losses.append(loss.item())


def make_batch(config: Config) -> tuple[Tensor, ...]:
    """Sizes of the tiny scale: a clip is 3 x 12 x 16 latents."""
    generator = torch.Generator().manual_seed(0)
    clips, grid = config.train.micro_batch_size, (3, config.data.height // 4, config.data.width // 4)
    latents = torch.randn(2 * clips, CHANNELS, *grid, generator=generator)
    condition = torch.randn(clips, CHANNELS + 4, *grid, generator=generator)
    text = torch.randn(clips, TOKENS_BEFORE, TEXT_DIM, generator=generator)
    return latents, condition, torch.full((2 * clips,), 0.6), text, torch.randn(latents.shape, generator=generator)


def measure(config: Config, repeats: int) -> str:
    """Rows of the table for this process's precision."""
    chosen = training_attention(config, CPU)
    tokens = config.base.max_text_tokens
    ways = {"before": Way("native", False, TOKENS_BEFORE), "text": Way("native", False, tokens)}
    if chosen != "native":
        ways["attention"] = Way(chosen, False, tokens)
    if can_compile(CPU):
        ways["compiled"] = Way(chosen, True, tokens)
    batch = make_batch(config)
    for way in ways.values():
        way.build(config)
    for _ in range(repeats + 1):
        for way in ways.values():
            way.step(config, batch)
    lines = []
    usual = statistics.median(ways["before"].seconds[1:])
    for name, way in ways.items():
        seconds = statistics.median(way.seconds[1:])
        drift = max(abs(a / b - 1) for a, b in zip(way.losses, ways["text"].losses, strict=True))
        differs = "other text" if name == "before" else f"{drift:.1e}"
        cells = [describe_precision(config, CPU).split(" (")[0], name, f"{seconds:.2f}", f"{usual / seconds:.2f}",
                 f"{way.seconds[0] - seconds:.0f}", differs]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", action="store_true", help="this process's rows alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config([str(REPO / "configs" / "dlc.yaml")], [])
    if not args.rows:
        print("| precision | way | CPU s a step | times as fast | first step more | loss differs, relative |")
        print("|---|---|---:|---:|---:|---:|", flush=True)
    print(measure(config, args.repeats), flush=True)
    if not args.rows:
        command = [sys.executable, __file__, "--rows", "--repeats", str(args.repeats)]
        subprocess.run(command, env={**os.environ, **LAPTOP}, check=True)
        print(f"\nMedians of {args.repeats} steps that take turns, one thread, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
