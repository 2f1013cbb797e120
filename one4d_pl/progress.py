"""Progress bars: on a terminal tqdm's, elsewhere a plain line now and then.

A log file would be flooded by a bar, which writes itself again ten times a second with a carriage
return.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

LINE_S = 30.0  # between two lines where no terminal shows a bar


class Progress(tqdm):
    """A tqdm bar that writes lines, with the time left, where stderr is no terminal.

    The first line comes after LINE_S seconds, the last one at the end; there is no carriage return.
    """

    def __init__(
        self,
        iterable: Iterable[object] | None = None,
        desc: str = "",
        total: int | None = None,
        unit: str = "it",
        initial: int = 0,  # how many of `total` are done already
        disable: bool = False,
    ) -> None:
        self.on_terminal, self.written = sys.stderr.isatty(), time.monotonic()
        super().__init__(
            iterable,
            desc,
            total,
            unit=unit,
            initial=initial,
            disable=disable,
            leave=self.on_terminal,
            dynamic_ncols=self.on_terminal,
            ncols=None if self.on_terminal else 0,  # 0 = numbers without a bar
            smoothing=0.3 if self.on_terminal else 0,  # 0 = the mean rate since the start
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the present state, or `msg`; return whether anything was written."""
        if self.on_terminal:
            return bool(super().display(msg, pos))
        due = msg is None and time.monotonic() - self.written >= LINE_S
        if due:
            self._write_line()
        return due

    def clear(self, nolock: bool = False) -> None:
        """Take the bar off the terminal."""
        if self.on_terminal:
            super().clear(nolock)

    def close(self) -> None:
        """Write the last line."""
        if not getattr(self, "disable", True) and not self.on_terminal:
            self._write_line()
        super().close()

    def _write_line(self) -> None:
        self.written = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()
