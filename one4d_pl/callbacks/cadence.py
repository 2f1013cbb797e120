"""The schedule of what costs more than a validation."""

from __future__ import annotations


class Cadence:
    """Due at the first validation at or after every multiple of `every` steps, 0 included."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.next_step = 0

    def start(self, step: int) -> None:
        """Begin at `step`: a resumed run keeps the cadence of one that was never stopped.

        This is exact where there is a validation at every multiple; else a multiple before `step` may be left out.
        """
        self.next_step = -(-step // self.every) * self.every

    def due(self, step: int) -> bool:
        """Tell whether it is due at `step`; a yes moves on to the next multiple."""
        if step < self.next_step:
            return False
        self.next_step = (step // self.every + 1) * self.every
        return True
