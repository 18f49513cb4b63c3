"""Runs Python's garbage collector at the same steps on every rank.

Automatic collection runs at a different moment on each rank, and all ranks then wait in the next collective
for the one that is collecting.
"""

import gc
from types import TracebackType
from typing import Self

EVERY_STEPS = 1000
"""Steps between collections of the younger generations; full ones follow evaluations and saves."""


class GarbageControl:
    """Context without automatic collection; objects that exist on entry are frozen (`gc.freeze`).

    They stay frozen: a rank exits after its training, and walking every imported module once more would only
    delay that. A process that trains several times calls `gc.unfreeze()` between.
    """

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def after_step(self, step: int) -> None:
        """Collect the younger generations every `EVERY_STEPS` steps."""
        if step % EVERY_STEPS == 0:
            gc.collect(1)

    def at_pause(self) -> None:
        """Collect all generations; called after an evaluation or a save."""
        gc.collect()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._was_enabled:
            gc.enable()
