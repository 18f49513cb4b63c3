"""Signals to the command are noted, not died of, from the first attempt to the last."""

import signal
from types import TracebackType
from typing import Any, Self

from drumline.processes import STOP_SIGNALS


class Signals:
    """As a context: notes the stop signals.

    A second Ctrl-C means now; a SIGTERM after a SIGUSR1 is only a scheduler that says it twice.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    @property
    def first(self) -> int | None:
        """The first one that came."""
        return self._received[0] if self._received else None

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C was pressed again."""
        return bool(self._received) and self._received[1:].count(signal.SIGINT) > 0

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, lambda got, frame: self._received.append(got))
            for number in STOP_SIGNALS
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
