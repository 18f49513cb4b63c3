"""How long a rank computes by itself: its forwards, where it waits for no other rank.

Steps take equally long on all ranks, because they wait for each other; only this tells who is slow.
"""

import time

import torch


class ForwardTimer:
    """Of one rank. On a GPU the forwards are timed by events, and counted when the step is over."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def start(self) -> None:
        """A forward begins."""
        if self._on_gpu:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """It is done; its backward is next."""
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def total(self) -> float:
        """Seconds of all forwards so far; to be asked after the step's wait for the device."""
        for began, ended in self._events:
            self._seconds += began.elapsed_time(ended) / 1000
        self._events.clear()
        return self._seconds
