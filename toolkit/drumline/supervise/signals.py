"""Records stop signals to the command instead of dying of them, across all attempts."""

import signal
from types import TracebackType
from typing import Any, Self

from drumline.processes import STOP_SIGNALS, heeded


class Signals:
    """Context manager that records stop signals.

    A SIGINT after the first signal means stop at once; a SIGTERM after a SIGUSR1 does not, because
    schedulers send both for one stop.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    @property
    def first(self) -> int | None:
        """The first stop signal received, if any."""
        return self._received[0] if self._received else None

    @property
    def at_once(self) -> bool:
        """Whether a SIGINT (Ctrl-C) followed an earlier stop signal."""
        return bool(self._received) and self._received[1:].count(signal.SIGINT) > 0

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, lambda got, frame: self._received.append(got))
            for number in STOP_SIGNALS
            if heeded(number)
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
