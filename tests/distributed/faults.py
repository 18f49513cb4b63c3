"""Faults planted in ranks by tests, through the phases that the loop reports.

DRUMLINE_TEST_FAULTS is a JSON list. Each has `what`, and when: `rank` (or none: all), `attempt` (or
none: each), and either `count` (the n-th phase that the rank enters) or `step` and `phase`. `per_device_above` limits an out-of-memory to plans with a larger micro-batch.
"""

import ctypes
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from drumline.phases import Phase
from drumline.processes import Process
from drumline.train import batches, watch


def plant(argv: list[str]) -> None:
    """In a forked rank, before it runs."""
    rank, attempt = int(os.environ["RANK"]), int(argv[argv.index("--attempt") + 1])
    per_device = json.loads(Path(argv[argv.index("--plan") + 1]).read_text())["batch"]["per_device"]
    mine = [
        fault
        for fault in json.loads(os.environ["DRUMLINE_TEST_FAULTS"])
        if fault.get("rank", rank) == rank
        and fault.get("attempt", attempt) == attempt
        and per_device > fault.get("per_device_above", 0)
    ]
    for fault in mine:
        if fault["what"] == "nan":
            _poison(fault["step"])
    _watch_for([fault for fault in mine if fault["what"] != "nan"])


def _watch_for(mine: list[dict[str, Any]]) -> None:
    real, count = watch.Watch.enter, 0

    def enter(self: watch.Watch, phase: Phase, detail: str = "", limit_s: float = 0.0) -> None:
        nonlocal count
        count += 1
        real(self, phase, detail, limit_s)
        for fault in mine:
            by_phase = self.step == fault.get("step") and phase == fault.get("phase")
            if count == fault.get("count") or by_phase:
                _strike(fault)

    watch.Watch.enter = enter  # type: ignore[method-assign]


def _strike(fault: dict[str, Any]) -> None:
    if delay := fault.pop("delay_s", 0):
        threading.Timer(delay, _strike, [fault]).start()
        return
    match fault["what"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "signal":
            os.kill(os.getpid(), fault["signal"])
        case "signal the command":
            supervisor = Process.parse(os.environ["DRUMLINE_SUPERVISOR"])
            assert supervisor
            os.kill(supervisor.pid, fault["signal"])
        case "kill the command":
            supervisor = Process.parse(os.environ["DRUMLINE_SUPERVISOR"])
            assert supervisor
            os.kill(supervisor.pid, signal.SIGKILL)
        case "sleep":
            time.sleep(fault.get("seconds", 1000))
        case "sleep with the lock":  # stuck in C: no thread of Python goes on either
            ctypes.PyDLL(None).sleep(1000)
        case "out of memory":
            torch.empty(1 << 60, dtype=torch.uint8)  # the allocator's own refusal
        case "raise":
            raise ValueError("planted")


def _poison(step: int) -> None:
    real = batches.StepReader.read

    def read(self: batches.StepReader, number: int) -> batches.Step:
        found = real(self, number)
        if number == step and found.micro_batches[0].indices.size:
            found.micro_batches[0].tensors["features"][0, 0] = float("nan")
        return found

    batches.StepReader.read = read  # type: ignore[method-assign]
