"""The way in and out of a command."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from one4d_pl.commands.command import PIPE_CLOSED, USER_ERROR, Command, exit_code
from one4d_pl.config import ConfigError
from one4d_pl.interrupts import INTERRUPTED
from tests.commands.interrupts import REPO


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("work", "code", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (lambda: raising(ConfigError("data.num_frames: 18")), USER_ERROR, "error: data.num_frames: 18\n"),
        (lambda: raising(KeyboardInterrupt()), INTERRUPTED, ""),
    ],
)
def test_what_a_command_does_becomes_an_exit_code(capsys, work, code, line):
    assert exit_code(work) == code
    assert capsys.readouterr().err == line


def test_a_bug_stays_a_traceback():
    for error in (ValueError("of ours"), KeyError("x"), BrokenPipeError("a socket's")):
        with pytest.raises(type(error)):
            exit_code(lambda error=error: raising(error))


def test_arguments_reach_the_work_and_mistakes_in_them_end_with_2(capsys):
    seen = []
    command = Command(
        "a.b", "Do it.", lambda parser: parser.add_argument("--n", type=int), lambda args: seen.append(args)
    )
    assert command(["--n", "3"]) == 0 and seen == [argparse.Namespace(n=3)]
    with pytest.raises(SystemExit, match="2"):
        command(["--n", "three"])
    assert "usage: a.b" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [1, 1000, 100_000])
def test_a_reader_that_has_enough_ends_a_command_without_a_word(lines):
    program = (
        "from one4d_pl.commands.command import Command\n"
        f"Command('a', '', lambda parser: None, lambda args: print('line\\n' * {lines})).run_process()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(20) == PIPE_CLOSED
