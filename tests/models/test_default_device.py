"""What is built does not depend on torch's default device, which Lightning sets to the GPU around `configure_model`.

Stood for here by meta: what lands there by mistake has no values, and cannot be mixed with a CPU's generator either.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from one4d_pl.models.coupling import couple
from one4d_pl.training.module import One4DModule
from one4d_pl.training.strategy import training_data


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those that are not saved included."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def assert_same_on_meta(build: Callable[[], list[nn.Module]]) -> None:
    expected = build()
    with torch.device("meta"):
        built = build()
    for module, plain in zip(built, expected, strict=True):
        found, wanted = tensors(module), tensors(plain)
        assert found.keys() == wanted.keys() and len(found) > 0
        for name, tensor in found.items():
            assert tensor.device == torch.device("cpu"), name
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0, msg=name)


def test_an_adapter_is_drawn_the_same_on_every_default_device(tiny_base_plain, run_config):
    bases = [tiny_base_plain.transformer() for _ in range(2)]

    def build() -> list[nn.Module]:
        return [couple(bases.pop(), run_config().dlc, seed=0)]

    assert_same_on_meta(build)


@pytest.mark.parametrize("coupling", ["decoupled", "channel", "width"])
def test_configure_model_builds_the_same_on_every_default_device(tiny_base, run_config, monkeypatch, coupling):
    monkeypatch.setattr(One4DModule, "_measure_latents", lambda module: ([0.5] * 16, [0.25] * 16))
    base = (f"base.path={tiny_base.path}", f"base.max_text_tokens={tiny_base.max_text_tokens}")
    config = run_config(*base, "dlc.standardise_xyz=true", f"dlc.coupling={coupling}")

    modules = [One4DModule(config, adapters=None) for _ in range(2)]

    def build() -> list[nn.Module]:
        module = modules.pop()
        module.configure_model()
        return [module, module.encoders]

    assert_same_on_meta(build)


def test_latents_are_measured_the_same_on_every_default_device(tiny_base_plain, run_config):
    config = run_config("dlc.standardise_xyz=true")
    datamodule = training_data(config)
    datamodule.prepare_data()
    datamodule.setup("fit")
    module = One4DModule(config, adapters=None)
    module._trainer = SimpleNamespace(
        is_global_zero=True, datamodule=datamodule,
        strategy=SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda found: found),
    )  # fmt: skip
    with torch.device("meta"):
        module.configure_model()
    found = datamodule.describe_latents()
    torch.testing.assert_close(module.transformer.codec.mean.flatten(), torch.tensor(found.xyz_mean))
    assert not module.transformer.codec.mean.is_meta and float(module.transformer.codec.std.min()) > 0
