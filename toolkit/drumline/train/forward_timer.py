"""Times a rank's forwards, to find slow ranks.

Ranks wait for each other within a step, so step times are equal on all of them; forward times are not.
"""

import time

import torch


class ForwardTimer:
    """Sums one rank's forward times. On a GPU they come from CUDA events, read once the step is over."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def start(self) -> None:
        """Mark the start of a forward."""
        if self._on_gpu:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Mark the end of the forward."""
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def total(self) -> float:
        """Seconds of all forwards so far; call it after the step's device synchronisation."""
        for began, ended in self._events:
            self._seconds += began.elapsed_time(ended) / 1000
        self._events.clear()
        return self._seconds
