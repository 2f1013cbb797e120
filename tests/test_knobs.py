"""Bounds and "may change" stand on the knob itself; one comparison tells what a run that goes on would change."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest

from one4d_pl.config import Config, ConfigError, as_dict, changeable, changes, flatten
from one4d_pl.config.checks import check, knob


@dataclass
class Some:
    count: int = knob(1, low=1)
    share: float = knob(0.5, low=0, high=1, may_change=True)
    rate: float = knob(1e-3, above=0)
    kind: str = knob("a", one_of=("a", "b"))

    def __post_init__(self) -> None:
        check("some", self)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"count": 0}, "some.count: must be >= 1, got 0"),
        ({"count": math.inf}, "some.count: must be >= 1, got inf"),
        ({"share": 1.1}, "some.share: must be between 0 and 1, got 1.1"),
        ({"share": math.nan}, "some.share: must be between 0 and 1, got nan"),
        ({"rate": 0}, "some.rate: must be > 0 and finite, got 0"),
        ({"rate": math.nan}, "some.rate: must be > 0 and finite, got nan"),
        ({"kind": "c"}, "some.kind: 'c' is not one of a, b"),
    ],
)
def test_a_value_outside_its_bounds_is_named(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Some(**values)  # type: ignore[arg-type]
    assert str(caught.value) == complaint


def test_every_default_is_within_its_bounds() -> None:
    Config()


def test_what_may_change_is_told_by_the_knob_or_its_section() -> None:
    may_change = changeable(Config)
    assert all(map(may_change, ("train.max_steps", "sampler.guidance.text", "data.toy.seed", "run_dir")))
    assert not any(map(may_change, ("train.seed", "optim.lr", "dlc.rank", "data.sources", "masking.text_prob")))


def test_a_section_that_may_change_holds_no_knob_that_says_so_again() -> None:
    for section in dataclasses.fields(Config):
        if section.metadata.get("may_change") and dataclasses.is_dataclass(
            kind := type(getattr(Config(), section.name))
        ):
            assert not [field.name for field in dataclasses.fields(kind) if field.metadata.get("may_change")]


def test_a_setting_younger_than_what_is_stored_had_its_default() -> None:
    now = flatten(as_dict(Config()))
    stored = {key: value for key, value in now.items() if key != "optim.ema_decay"}
    assert not changes(stored, now, defaults=now)
    assert [str(change) for change in changes(stored, now)] == ["optim.ema_decay (None -> 0.0)"]
    assert [change.key for change in changes(stored | {"train.seed": 1}, now, now)] == ["train.seed"]
    assert not changes(stored | {"train.seed": 1}, now, now, ignore=lambda key: key == "train.seed")
