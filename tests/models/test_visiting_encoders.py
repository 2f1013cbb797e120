"""Encoders wait on the host and visit where they work: same results, nothing left behind, opened only where needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from one4d_pl.data.datamodule import One4DDataModule
from one4d_pl.models import wan
from one4d_pl.models.sample_encoder import FrozenSampleEncoder
from one4d_pl.models.wan import ENCODER_PARTS, WanEncoders, fingerprint
from one4d_pl.training import module as training_module
from one4d_pl.training.module import One4DModule
from one4d_pl.types import collate


def places(part: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*part.parameters(), *part.buffers())]


@pytest.fixture
def visitors(tiny_base) -> WanEncoders:
    """As on a GPU: what visits is a copy, even if here it is one in the same memory."""
    encoders = tiny_base.encoders().wait_on_host(torch.device("cpu"))
    assert not encoders.waits_on_host  # nothing to be gained from on a CPU
    encoders.waits_on_host = True
    encoders._park_text_blocks(torch.device("cpu"))
    return encoders


def test_visitors_say_what_residents_say_and_leave_nothing_behind(tiny_base, visitors):
    residents, generator = tiny_base.encoders(), torch.Generator().manual_seed(0)
    frames = torch.rand(1, 3, 5, 32, 32, generator=generator) * 2 - 1
    parts = [part for part in (visitors.vae, visitors.text_encoder, visitors.image_encoder) if part is not None]
    before = [places(part) for part in parts]
    seen: list[list[int]] = []
    for part in parts:
        part.register_forward_pre_hook(lambda part, inputs: seen.append(places(part)))
    for mode in (True, False):  # a validation comes first
        with torch.inference_mode(mode):
            for ask in (
                lambda encoders: encoders.encode(frames),
                lambda encoders: encoders.decode(torch.zeros(1, 16, 2, 4, 4)),
                lambda encoders: encoders.encode_prompts(["a ball"])[0],
                lambda encoders: encoders.encode_image(frames[:, :, 0]),
            ):
                expected, found = ask(residents), ask(visitors)
                assert (expected is None) == (found is None)
                if expected is not None:
                    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [places(part) for part in parts] == before
    text = {name for name, _ in visitors.text_encoder.named_parameters()}
    assert not any(".block." in name and name.endswith(("SelfAttention.q.weight", "wo.weight")) for name in text)
    homes = {pointer for pointers in before for pointer in pointers}
    assert seen and not any(set(pointers) & homes for pointers in seen)
    assert not any(tensor.is_inference() for part in parts for tensor in part.parameters())


def test_a_visit_ends_where_the_work_fails(visitors):
    before = places(visitors.vae)
    with pytest.raises(ValueError, match="frames"):
        visitors.encode(torch.zeros(1, 3, 4, 32, 32))
    with pytest.raises(RuntimeError):
        visitors.decode(torch.zeros(1, 3, 2, 4, 4))
    assert places(visitors.vae) == before


@pytest.fixture
def opened(monkeypatch) -> Iterator[list[str]]:
    """Bases whose encoders were opened."""
    found: list[str] = []
    plain = wan.WanEncoders.of

    def of(base, *arguments):
        found.append(base.path)
        return plain(base, *arguments)

    monkeypatch.setattr(training_module.WanEncoders, "of", staticmethod(of))
    yield found


def test_a_step_on_encodings_opens_no_encoder_and_a_step_on_pixels_does(run_config, opened):
    config = run_config()
    module = One4DModule(config, adapters=None)
    module.configure_model()
    prints = fingerprint(config.base.path, ENCODER_PARTS)
    data = One4DDataModule(config, lambda device: FrozenSampleEncoder.of(config, device), prints)
    data.prepare_data()
    data.setup("fit")
    opened.clear()
    clips = data.train_dataloader().dataset
    samples = [clips[position] for position in range(12)]
    whole = [sample for sample in samples if sample.task == "video"][:2]
    module.training_step(collate(whole), 0)["loss"].backward()
    assert opened == []
    sparse = [sample for sample in samples if sample.task in ("image", "sparse")][:1]
    module.training_step(collate(sparse), 0)  # its condition is not stored in a cache: the VAE is needed
    assert len(opened) == 1
