"""The line of a logged step: what it says adds up, and a peak is shown only where one is known."""

from __future__ import annotations

import logging
import re
import time

import pytest

from one4d_pl.callbacks import throughput
from one4d_pl.callbacks.throughput import step_line
from one4d_pl.cluster.survival import Preemption
from one4d_pl.costs.flops import BatchShape, TransformerShape, training_flops
from one4d_pl.data.decode import ClipStream
from one4d_pl.fit import fit
from one4d_pl.models.wan import load_transformer
from tests.conftest import scalars

LINE = re.compile(
    r"step (?P<step>\d+)/6 \| rgb (?P<rgb>[\d.]+) \| xyz (?P<xyz>[\d.]+) \| (?P<step_s>[\d.e-]+) s/step \| "
    r"(?P<samples>[\d.]+) samples/s \| data wait (?P<wait>[\d.]+)% \| (?P<tflops>[\d.e-]+) TFLOP/s"
    r"( \| MFU (?P<mfu>[\d.]+)% \| HFU (?P<hfu>[\d.]+)%)? \| (?P<gib>[\d.]+) GiB"
)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[re.Match[str]]:
    found = [LINE.fullmatch(r.getMessage()) for r in caplog.records if r.name == throughput.__name__]
    assert None not in found, caplog.text
    return [match for match in found if match is not None]


def test_one_line_per_logged_step_whose_numbers_belong_together(run_config, caplog):
    config = run_config("train.log_every=2", "train.micro_batch_size=1", "train.activation_checkpointing=full")
    with caplog.at_level(logging.INFO):
        fit(config)
    lines, logged = lines_of(caplog), scalars(config.run_dir)
    assert [int(line["step"]) for line in lines] == [2, 4, 6]
    wan = load_transformer(config.base.path, "float32").config
    batch = BatchShape(1, (5, 4, 6), config.base.max_text_tokens)  # 17 frames of 32x48
    flops = training_flops(TransformerShape.of(dict(wan), config.dlc), batch, "full", flash=False)
    for line in lines:
        step = int(line["step"])
        assert line["mfu"] is None and "train/flops/mfu" not in logged  # no peak of this machine is known
        for name in ("rgb", "xyz"):
            assert float(line[name]) == pytest.approx(logged[f"train/loss/{name}"][step], abs=1e-4)
        step_s = logged["train/time/step_s"][step]
        assert float(line["step_s"]) == pytest.approx(step_s, rel=0.01)
        assert float(line["samples"]) == pytest.approx(4 / step_s, rel=0.01)
        assert 4 * flops.model / step_s / 1e12 == pytest.approx(logged["train/flops/tflops"][step], rel=1e-4)
        assert 0 <= float(line["wait"]) <= 100 and 0.05 < float(line["gib"]) < 100
    assert flops.hardware > flops.model


def test_with_a_peak_mfu_counts_the_method_and_hfu_what_is_executed(run_config, caplog, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda name, precision: 1e12)
    config = run_config("train.max_steps=6", "train.log_every=3", "train.activation_checkpointing=full")
    with caplog.at_level(logging.INFO):
        fit(config)
    logged = scalars(config.run_dir)
    for line in lines_of(caplog):
        step = int(line["step"])
        assert logged["train/flops/mfu"][step] == pytest.approx(logged["train/flops/tflops"][step], rel=1e-5)
        assert float(line["mfu"]) == pytest.approx(100 * logged["train/flops/mfu"][step], abs=0.051)
        assert 1.3 < logged["train/flops/hfu"][step] / logged["train/flops/mfu"][step] < 1.6  # a second forward


def test_data_wait_is_the_time_in_the_fetch_and_in_nothing_else(run_config, monkeypatch):
    """What other callbacks do between two steps (a sync, a gather, an all-reduce) is the step's, not the data's."""
    slow, fetch = 1.0, 0.05  # far apart, for a busy machine fetches late

    def between_steps(callback, *arguments):
        time.sleep(slow)

    def read(stream, position):
        time.sleep(fetch)
        return plain(stream, position)

    plain = ClipStream.__getitem__
    monkeypatch.setattr(Preemption, "on_train_batch_end", between_steps)
    monkeypatch.setattr(ClipStream, "__getitem__", read)
    config = run_config("train.max_steps=4", "train.global_batch_size=2", "val.every=100", "val.clips=1")
    fit(config)
    logged = scalars(config.run_dir)
    for step in (2, 3, 4):  # the first one's fetch begins before the clock of the step
        waited = logged["train/time/data_wait"][step] * logged["train/time/step_s"][step]
        assert 2 * fetch <= waited < 2 * fetch + 0.5 * slow


def test_the_line_of_a_large_run_can_be_read():
    metrics = {
        "train/time/step_s": 91.237, "train/time/samples_per_s": 0.7015, "train/time/data_wait": 0.0042,
        "train/flops/tflops": 412.3, "train/flops/mfu": 0.4169, "train/flops/hfu": 0.5871, "train/memory/gib": 71.26,
    }  # fmt: skip
    assert step_line(120, 2750, {"rgb": 0.08127, "xyz": 0.1044}, metrics) == (
        "step 120/2750 | rgb 0.0813 | xyz 0.1044 | 91.2 s/step | 0.702 samples/s | data wait 0.4% | 412 TFLOP/s"
        " | MFU 41.7% | HFU 58.7% | 71.3 GiB"
    )
