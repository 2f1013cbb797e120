"""Nine frames of each real slice: as published they raise no alarm, and every mistake is told by its name."""

from __future__ import annotations

import dataclasses

import pytest

from data_prep.conventions import believed_reading, compare_readings
from data_prep.sources import registry
from one4d_pl.types import Clip
from tests.data_prep.mistakes import MISTAKES, part, with_the_cameras_of_neighbours
from tests.data_prep.real_clips import REAL, pointodyssey_clip

pytestmark = [pytest.mark.realdata, pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")]
NINE = {"tartanair": range(1, 10), "tum": range(9), "pointodyssey": range(27, 36)}


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clip]:
    (tum,) = registry.iter_clips("rgbd", REAL / "tum", 9, stride=1, units=["rgbd_dataset_freiburg1_desk"])
    (bonn,) = registry.iter_clips("rgbd", REAL / "bonn", 8, stride=1)
    (tartanair,) = registry.iter_clips("tartanair", REAL / "tartanair", 17, stride=1)
    return {
        "tartanair": tartanair,
        "tum": tum,
        "bonn": bonn,
        "pointodyssey": pointodyssey_clip(tmp_path_factory.mktemp("odyssey")),
    }


def believed(clip: Clip) -> str | None:
    return believed_reading(compare_readings(clip).margins)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("tartanair", [range(0, 9), range(8, 17), range(0, 17, 2), range(17)]),
        ("tum", [range(9)]),
        ("bonn", [range(8)]),  # people walk before a camera that hardly moves
        ("pointodyssey", [range(0, 9), range(14, 23), range(28, 37), range(0, 36, 4), range(37)]),
    ],
)
def test_published_files_raise_no_alarm(slices, name, windows):
    assert [believed(part(slices[name], window)) for window in windows] == [None] * len(windows)


@pytest.mark.parametrize("name", NINE)
def test_nine_frames_tell_every_mistake(slices, name):
    sound = part(slices[name], NINE[name])
    mistaken = {reading: make(sound) for reading, make in MISTAKES.items()}
    if name == "tum":  # nine are all there are
        mistaken["cameras early"] = part(sound, range(9), [*range(1, 9), 8])
        mistaken["cameras late"] = part(sound, range(9), [0, *range(8)])
    else:
        mistaken |= with_the_cameras_of_neighbours(slices[name], NINE[name].start, 9)
    assert {reading: believed(clip) for reading, clip in mistaken.items()} == {reading: reading for reading in mistaken}


@pytest.mark.parametrize("name", NINE)
@pytest.mark.parametrize("factor", [1000.0, 0.04])
def test_nine_frames_tell_a_wrong_constant(slices, name, factor):
    sound = part(slices[name], NINE[name])
    scale = compare_readings(dataclasses.replace(sound, depth=sound.depth * factor)).depth_scale
    assert 0.7 < scale * factor < 1.5
