"""The way in and out of every command: parse, run, exit code. The user's error is one line, an interrupt none."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TextIO

from one4d_pl import interrupts
from one4d_pl.errors import FILE_SYSTEM, UserError

USER_ERROR = 2
PIPE_CLOSED = 141  # 128 + SIGPIPE: the reader (`| head`) has what it wanted


@dataclass(frozen=True)
class Command:
    """One command: what it is called, which arguments it takes, and what it does with them."""

    name: str  # as a user starts it
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]  # the exit code, None = 0
    end: Callable[[Callable[[], int]], NoReturn] = lambda work: sys.exit(work())  # the process, with that exit code

    def __call__(self, arguments: Sequence[str]) -> int:
        """Parse and run; return the exit code. SystemExit(2) of argparse where the arguments do not parse."""
        parser = argparse.ArgumentParser(
            prog=self.name,
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_arguments(parser)
        args = parser.parse_args(arguments)
        return exit_code(lambda: self.run(args))

    def run_process(self) -> NoReturn:
        """Live the whole life of a process."""
        interrupts.watch()
        self.end(lambda: self(sys.argv[1:]))


def exit_code(work: Callable[[], int | None]) -> int:
    """Return what `work` does, 2 after the line of a UserError, 130 after an interrupt; a bug stays a traceback."""
    try:
        code = work() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return interrupts.INTERRUPTED
    except BrokenPipeError:
        if not any([_is_closed(sys.stdout), _is_closed(sys.stderr)]):
            raise  # a socket's
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in FILE_SYSTEM:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    return code


def _is_closed(stream: TextIO) -> bool:
    """Tell whether nobody reads a pipe any more; from then on what is still buffered goes nowhere."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # not of the system: pytest's
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True
