"""When something that costs more than a validation is due."""

from __future__ import annotations


class Cadence:
    """Due at the first validation at or after every multiple of `every` optimiser steps, step 0 included."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.next_step = 0

    def start(self, step: int) -> None:
        """Begin at `step`: a resumed run goes on with the cadence of the undisturbed one.

        Exactly where there is a validation at every multiple; else a multiple before `step` may be passed over.
        """
        self.next_step = -(-step // self.every) * self.every

    def due(self, step: int) -> bool:
        """Whether it is due at `step`; asked once per validation, since a yes moves on to the next multiple."""
        if step < self.next_step:
            return False
        self.next_step = (step // self.every + 1) * self.every
        return True
