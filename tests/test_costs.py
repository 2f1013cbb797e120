"""The closed-form count of operations against torch's own counter, on real tiny transformers."""

from __future__ import annotations

import random

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from one4d_pl.config import ConfigError, DLCConfig
from one4d_pl.costs.flops import BatchShape, Flops, TransformerShape, peak_flops, training_flops
from one4d_pl.models.transformer import One4DTransformer

SHAPES = 50
EXACT = 1e-4
aten = torch.ops.aten
# torch's counter does not know the CPU's flash kernels; the GPU's it counts with these very functions
CPU_FLASH = {
    aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *args, out_shape=None, **kwargs: sdpa_flop_count(query, key, value)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(
            grad, query, key, value
        )
    ),
}


class Case:
    """A random transformer and batch, and what torch counts of it."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        heads, layers = chance.randint(1, 3), chance.randint(1, 3)
        image = chance.random() < 0.4  # then diffusers fixes 512 text tokens
        self.wan = {
            "patch_size": (1, 2, 2), "num_attention_heads": heads, "attention_head_dim": 6 * chance.randint(1, 3),
            "in_channels": 2 * 4 + 4, "out_channels": 4, "text_dim": chance.randint(4, 24),
            "freq_dim": 2 * chance.randint(4, 16), "ffn_dim": chance.randint(16, 96), "num_layers": layers,
            "image_dim": chance.randint(4, 20) if image else None,
        }  # fmt: skip
        width = heads * int(str(self.wan["attention_head_dim"]))
        self.dlc = DLCConfig(
            rank=chance.randint(1, 8),
            num_links=chance.randint(0, layers),
        )
        added = {"added_kv_proj_dim": width} if image else {}
        self.transformer = One4DTransformer(WanTransformer3DModel(**self.wan, **added), self.dlc, seed=0)
        self.batch = BatchShape(
            chance.randint(1, 2), (chance.randint(1, 4), 2 * chance.randint(1, 4), 2 * chance.randint(1, 4)),
            512 if image else chance.randint(1, 40), chance.randint(1, 30) if image else 0,
        )  # fmt: skip

    def count(self, backward: bool, flash: bool) -> int:
        """torch's count; inputs are drawn outside."""
        b, grid = self.batch.clips, self.batch.latent_grid
        image_dim = self.transformer.base.config.image_dim
        inputs = (
            torch.randn(2 * b, 4, *grid), torch.randn(b, 8, *grid), torch.rand(b).repeat(2),
            torch.randn(b, self.batch.text_tokens, int(str(self.wan["text_dim"]))),
            None if image_dim is None else torch.randn(b, self.batch.image_tokens, image_dim),
        )  # fmt: skip
        counter = FlopCounterMode(display=False, custom_mapping=CPU_FLASH)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if flash else SDPBackend.MATH), counter:
            with torch.set_grad_enabled(backward):
                velocity = self.transformer(*inputs)
            if backward:
                velocity.square().mean().backward()
        return counter.get_total_flops()

    def ours(self, checkpointing: str, flash: bool) -> Flops:
        return training_flops(TransformerShape.of(self.wan, self.dlc), self.batch, checkpointing, flash)


@pytest.mark.parametrize("seed", range(SHAPES))
def test_our_count_is_torchs(seed):
    case = Case(seed)
    flops = case.ours("none", flash=False)
    assert flops.recompute == 0
    assert flops.forward == pytest.approx(case.count(backward=False, flash=False), rel=EXACT)
    assert flops.model == pytest.approx(case.count(backward=True, flash=False), rel=EXACT)
    flash = case.ours("none", flash=True)
    assert flash.model == flops.model
    assert flash.hardware == pytest.approx(case.count(backward=True, flash=True), rel=EXACT)
    for mode in ("full", "selective"):
        case.transformer.set_activation_checkpointing(mode)
        checkpointed = case.ours(mode, flash=True)
        assert checkpointed.model == flops.model
        assert checkpointed.hardware == pytest.approx(case.count(backward=True, flash=True), rel=EXACT), mode
    assert case.ours("none", flash=True).recompute < checkpointed.recompute < case.ours("full", flash=True).recompute


def test_the_papers_step_in_numbers():
    """81 frames at 352x624 on Wan 14B: a hand count of the leading terms."""
    wan = {
        "patch_size": [1, 2, 2], "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 36,
        "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40, "image_dim": 1280,
    }  # fmt: skip
    batch = BatchShape(1, (21, 44, 78), 512, 257)
    flops = training_flops(TransformerShape.of(wan, DLCConfig()), batch, "full", flash=True)
    tokens, width = 21 * 22 * 39, 5120
    linears = 40 * 2 * (6 * width**2 + 2 * width * 13824) * 2 * tokens
    attention = 40 * 4 * 2 * tokens**2 * width
    assert flops.forward == pytest.approx(linears + attention, rel=0.06)  # LoRAs, context and embedders: 5 %
    assert 1.0 <= flops.backward / flops.forward <= 1.5  # attention's backward is double, the frozen linears' single
    assert flops.recompute / flops.forward == pytest.approx(1.15, abs=0.1)
    selective = training_flops(TransformerShape.of(wan, DLCConfig()), batch, "selective", flash=True)
    assert flops.recompute - selective.recompute == attention


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GH200 480GB", 989), ("Tesla V100-SXM2-16GB", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peaks_are_found_by_the_names_that_drivers_report(name, tera):
    assert peak_flops(name, "bf16-mixed") == (None if tera is None else tera * 1e12)
    assert peak_flops(name, "32-true") is None


def test_a_config_that_is_no_wans_is_named():
    with pytest.raises(ConfigError, match="patch_size"):
        TransformerShape.of({}, DLCConfig())
    with pytest.raises(ConfigError, match="num_layers"):
        TransformerShape.of({"patch_size": [1, 2, 2]}, DLCConfig())
