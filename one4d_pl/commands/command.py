"""What all commands share: parse the arguments, run, return an exit code.

A user's error is printed as one line, an interrupt as nothing.
"""

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
PIPE_CLOSED = 141  # 128 + SIGPIPE: the reader (`| head`) needs no more


@dataclass(frozen=True)
class Command:
    """One command: its name, its arguments, and what it does with them."""

    name: str  # as a user starts it
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]  # the exit code, None = 0
    # ends the process with the exit code of the work it is given
    end: Callable[[Callable[[], int]], NoReturn] = lambda work: sys.exit(work())

    def parser(self) -> argparse.ArgumentParser:
        """Make the parser of its arguments."""
        parser = argparse.ArgumentParser(
            prog=self.name, description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_arguments(parser)
        return parser

    def __call__(self, arguments: Sequence[str]) -> int:
        """Parse and run; return the exit code. argparse raises SystemExit(2) for arguments that do not parse."""
        args = self.parser().parse_args(arguments)
        return exit_code(lambda: self.run(args))

    def run_process(self) -> NoReturn:
        """Run as the only command of this process, from its arguments to its exit."""
        interrupts.watch()
        self.end(lambda: self(sys.argv[1:]))


def exit_code(work: Callable[[], int | None]) -> int:
    """Run `work` and return its exit code.

    2 after a UserError, printed as one line; 130 after an interrupt. A bug stays a traceback.
    """
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
            raise  # some socket's, not the output's
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in FILE_SYSTEM:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    return code


def _is_closed(stream: TextIO) -> bool:
    """Tell whether a pipe has no reader any more.

    If so, what is still buffered is discarded, so that flushing it at exit cannot fail.
    """
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # no file of the system, but pytest's capture
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True
