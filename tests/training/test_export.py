"""The export door: an adapter without optimiser state, as it was or in half the bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from one4d_pl.commands import export
from one4d_pl.config import DEMO_ADAPTERS
from one4d_pl.fit import fit
from one4d_pl.models.adapters import AdapterCard, load_adapters
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.models.wan import load_transformer
from one4d_pl.training.checkpoint_files import newest_checkpoint


@pytest.mark.parametrize("dtype", export.DTYPES)
def test_an_exported_adapter_is_the_checkpoints(run_config, tmp_path, dtype):
    config = run_config("train.max_steps=2")
    fit(config)
    assert export.main([config.run_dir, "--out", str(tmp_path / "adapter"), "--dtype", dtype]) == 0
    checkpoint = newest_checkpoint(config.run_dir)
    transformers = []
    for folder in (checkpoint, tmp_path / "adapter"):
        transformer = One4DTransformer(load_transformer(config.base.path, "float32"), config.dlc, seed=1)
        load_adapters(transformer, folder, AdapterCard.read(checkpoint).base_fingerprint)
        transformers.append(dict(transformer.trainable_parameters()))
    for name, parameter in transformers[0].items():
        assert torch.equal(parameter.to(getattr(torch, dtype)).float(), transformers[1][name])
    assert not (tmp_path / "adapter" / "optimizer.safetensors").exists()
    stored = load_file(tmp_path / "adapter" / "links.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}


def test_bad_arguments_are_one_line_and_leave_nothing(capsys, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "card.json").write_text("{")
    for checkpoint, out, word in (
        (tmp_path / "none", tmp_path / "a", "neither a checkpoint"),
        (tmp_path / "broken", tmp_path / "a", "need an adapter"),
        (tmp_path, tmp_path / "there", "neither a checkpoint"),
    ):
        assert export.main([str(checkpoint), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["broken", "there"]


@pytest.mark.parametrize(
    "lost",
    [
        "xyz/adapter_model.safetensors",
        "rgb/adapter_config.json",
        "links.safetensors",
        "xyz_patch_embedding.safetensors",
    ],
)
def test_an_incomplete_adapter_is_named_with_the_file_that_it_lacks(tmp_path, capsys, lost):
    broken = tmp_path / "adapter"
    shutil.copytree(DEMO_ADAPTERS, broken)
    assert export.main([str(broken), "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    (broken / lost).unlink()
    assert export.main([str(broken), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{broken}: an incomplete adapter, no {lost}" in error and "--out" not in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "whole"]


def test_a_cut_file_of_an_adapter_is_named(tmp_path, capsys):
    broken = tmp_path / "adapter"
    shutil.copytree(DEMO_ADAPTERS, broken)
    path = broken / "links.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert export.main([str(broken), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{path}: " in error and "--out" not in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
