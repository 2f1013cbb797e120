"""Progress in a terminal and in a log file."""

from __future__ import annotations

import io
import re
import sys

import pytest

from one4d_pl import progress
from one4d_pl.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> io.StringIO:
    """`stream` in the place of stderr; inside a test, since pytest sets its own before each."""
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_log_file_gets_one_line_of_a_short_job(monkeypatch):
    stderr = watched(monkeypatch, io.StringIO())
    assert list(Progress(range(1000), desc="encoding clips", unit="clip")) == list(range(1000))
    (line,) = stderr.getvalue().splitlines()
    assert re.fullmatch(r"encoding clips: 100% 1000/1000 \[00:00<00:00, .*clip/s\]", line)
    assert "\r" not in stderr.getvalue() and stderr.getvalue().endswith("\n")


def test_a_log_file_gets_a_line_per_half_minute_with_the_time_left(monkeypatch):
    stderr = watched(monkeypatch, io.StringIO())
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress(desc="sampling", total=40, unit="step", initial=8) as bar:
        for _ in range(20):
            clock[0] += 10
            bar.set_postfix_str("3 GiB")  # shows the bar again, as update does
            bar.update()
        bar.write("left out: a clip")
    lines = stderr.getvalue().splitlines()
    assert [int(re.search(r" (\d+)/40 ", line)[1]) for line in lines] == [10, 13, 16, 19, 22, 25, 28]
    assert all(re.search(r"\[\d+:\d+<\d+:\d+, .*step.*, 3 GiB\]$", line) for line in lines)
    assert "\r" not in stderr.getvalue() and "\x1b" not in stderr.getvalue()


def test_a_disabled_one_and_one_of_unknown_length_say_what_they_know(monkeypatch):
    stderr = watched(monkeypatch, io.StringIO())
    assert list(Progress(range(3), disable=True)) == [0, 1, 2]
    assert stderr.getvalue() == ""
    with Progress(desc="sampling", unit="step") as bar:
        bar.update(4)
    assert stderr.getvalue().startswith("sampling: 4step [") and stderr.getvalue().count("\n") == 1


def test_a_terminal_gets_tqdm_s_bar(monkeypatch):
    stderr = watched(monkeypatch, Terminal())
    assert sum(Progress(range(4), desc="rendering", unit="clip")) == 6
    assert "\rrendering: 100%|##########| 4/4" in stderr.getvalue().replace("█", "#")
