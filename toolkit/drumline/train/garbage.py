"""Python's garbage collector under control: it runs at steps of our choice, the same on every rank.

Left to itself it runs on each rank at another moment, and all ranks wait in the next collective for the one
that is collecting.
"""

import gc
from types import TracebackType
from typing import Self

EVERY_STEPS = 1000
"""Younger generations are collected after so many steps, and all of them where the loop pauses anyway."""


class GarbageControl:
    """As a context: automatic collection is off, and what exists on entering is never looked at again."""

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def after_step(self, step: int) -> None:
        """Collect if it is time to."""
        if step % EVERY_STEPS == 0:
            gc.collect(1)

    def at_pause(self) -> None:
        """The ranks have evaluated or saved: a good moment for a whole collection."""
        gc.collect()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
