"""`make bench`: what coupling two branches costs, on one CPU thread at the 14B's proportions.

Stacked Decoupled LoRA Control beside two separate passes of two PEFT models, beside plain base forwards, and beside
width coupling (4DNeX: both branches in one sequence, twice as wide). All ways take turns; CPU seconds of this
process, so that other work on the machine disturbs little; medians. Beside each ratio stands that of the operations
(costs/flops.py).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from one4d_pl.config import DLCConfig
from one4d_pl.costs.flops import BatchShape, TransformerShape, training_flops
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.types import MODALITIES

TEXT_TOKENS, TEXT_DIM = 51, 64  # 512 of 18 thousand, at 1.8 thousand
LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
ROWS = (  # way, beside which way, and the most that the ratio, or the ratio over that of the operations, should be
    ("step: stacked DLC", "step: two passes", 1.05, "ratio"),
    ("forward: stacked DLC", "forward: two plain bases", 1.10, "ratio"),
    ("forward: stacked DLC", "forward: width coupling", 1.05, "of predicted"),
    ("step: stacked DLC", "step: width coupling", 1.05, "of predicted"),
)


class Coupling:
    """The models and inputs of one size.

    Args:
        heads: of 128 channels; the feed-forward is 2.7 times as wide, the rank in proportion to the 14B's 64.
        layers: an eighth of the blocks has a link, one at least.
        grid: of the latents.
    """

    def __init__(self, heads: int, layers: int, grid: tuple[int, int, int]) -> None:
        torch.manual_seed(0)
        self.grid, self.rank = grid, max(1, round(64 * heads / 40))
        self.settings = {
            "num_attention_heads": heads, "attention_head_dim": 128, "in_channels": 36, "out_channels": 16,
            "text_dim": TEXT_DIM, "freq_dim": 256, "ffn_dim": round(2.7 * 128 * heads), "num_layers": layers,
            "patch_size": (1, 2, 2),
        }  # fmt: skip
        self.plain = WanTransformer3DModel(**self.settings).requires_grad_(False)
        self.dlc_config = DLCConfig(rank=self.rank, num_links=max(1, layers // 8))
        self.dlc = One4DTransformer(copy.deepcopy(self.plain), self.dlc_config, seed=0)
        self.peft = copy.deepcopy(self.plain)
        for modality in MODALITIES:
            self.peft.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(LINEARS)), modality)
        for model in (self.dlc, self.peft):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad or "lora_" in name:
                    nn.init.normal_(parameter, std=0.02)
        self.latents, self.condition = torch.randn(2, 16, *grid), torch.randn(1, 20, *grid)
        self.text = torch.randn(1, TEXT_TOKENS, TEXT_DIM)

    def stacked(self) -> Tensor:
        return self.dlc(self.latents, self.condition, torch.full((2,), 0.7), self.text, None)

    def alone(self, model: WanTransformer3DModel, branch: int) -> Tensor:
        """One branch, one sample."""
        hidden = torch.cat([self.latents[branch : branch + 1], self.condition], dim=1)
        return model(hidden, torch.full((1,), 700.0), self.text, return_dict=False)[0]

    def widened(self) -> Tensor:
        """Both branches as one sample, side by side."""
        hidden = torch.cat([torch.cat([latents[None], self.condition], dim=1) for latents in self.latents], dim=-1)
        return self.peft(hidden, torch.full((1,), 700.0), self.text, return_dict=False)[0]

    def two_steps(self) -> None:
        for branch, modality in enumerate(MODALITIES):
            self.peft.set_adapter(modality)
            self.alone(self.peft, branch).square().mean().backward()

    def ways(self) -> dict[str, Callable[[], object]]:
        """What takes turns; the peft model's gradients pile up, as they would in an accumulation."""
        return {
            "step: stacked DLC": lambda: self.stacked().square().mean().backward(),
            "step: two passes": self.two_steps,
            "step: width coupling": lambda: self.widened().square().mean().backward(),
            "forward: stacked DLC": torch.no_grad()(self.stacked),
            "forward: two plain bases": torch.no_grad()(lambda: [self.alone(self.plain, branch) for branch in (0, 1)]),
            "forward: width coupling": torch.no_grad()(self.widened),
        }

    def operations(self) -> dict[str, float]:
        """Of each way."""
        dlc = TransformerShape.of(self.settings, self.dlc_config)
        lora = replace(dlc, num_links=0)
        batch = BatchShape(1, self.grid, TEXT_TOKENS)
        wide = replace(batch, latent_grid=(*self.grid[:2], 2 * self.grid[2]))

        def step(shape: TransformerShape, batch: BatchShape) -> float:
            return training_flops(shape, batch, "none", flash=True).hardware

        def forward(shape: TransformerShape, batch: BatchShape) -> float:
            return training_flops(shape, batch, "none", flash=True).forward

        return {
            "step: stacked DLC": step(dlc, batch),
            "step: two passes": step(lora, batch),
            "step: width coupling": step(lora, wide) / 2,  # one sample
            "forward: stacked DLC": forward(dlc, batch),
            "forward: two plain bases": forward(replace(lora, rank=0), batch),
            "forward: width coupling": forward(lora, wide) / 2,
        }


def measure(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way; all take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, work in ways.items():
            start = time.process_time()
            work()
            if turn:  # the first one warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def report(coupling: Coupling, seconds: dict[str, float], repeats: int) -> str:
    """The table and its method."""
    operations, tokens = coupling.operations(), coupling.grid[0] * coupling.grid[1] * coupling.grid[2] // 4
    lines = ["| way | CPU s | beside | CPU s | ratio | of operations | goal |", "|---|---:|---|---:|---:|---:|---|"]
    for way, other, goal, kind in ROWS:
        ratio, predicted = seconds[way] / seconds[other], operations[way] / operations[other]
        reached = ratio / predicted if kind == "of predicted" else ratio
        told = f"{kind} <= {goal}: {reached:.3f}"
        cells = [way, f"{seconds[way]:.3g}", other.split(": ")[1], f"{seconds[other]:.3g}", f"{ratio:.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{predicted:.3f}', told])} |")
    width = coupling.dlc.base.proj_out.in_features
    lines += [
        "",
        f"Width {width}, {len(coupling.plain.blocks)} blocks, {tokens} tokens per branch ({tokens / width:.1f} times "
        f"the width), rank {coupling.rank}, {len(coupling.dlc.links)} link(s), float32, no checkpointing; step = "
        f"forward and backward. CPU seconds of one thread, medians of {repeats} interleaved runs after one to warm up; "
        f"torch {torch.__version__}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4, help="of 128 channels (default 4; the 14B has 40)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 30, 30), help="latents (default 8 30 30: 1800 tokens)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    coupling = Coupling(args.heads, args.layers, tuple(args.grid))
    print(report(coupling, measure(coupling.ways(), args.repeats), args.repeats))


if __name__ == "__main__":
    main()
