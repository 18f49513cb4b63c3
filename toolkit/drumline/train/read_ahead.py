"""Reads micro-batches ahead: in a thread, or in worker processes where decoding takes longer than training.

Workers are torch's DataLoader: it asks them for one micro-batch after the other and hands them out in this
order, so that their number changes nothing but the speed.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from drumline.processes import STOP_SIGNALS, Process
from drumline.train.batches import MicroBatches, Request, Step, StepReader

READ_AHEAD_STEPS = 2
_RANK_POLL_S = 1.0
_PER_WORKER = 2
"""Micro-batches that each worker has ready at most."""


def read_ahead(reader: StepReader, first: int, last: int, workers: int = 0) -> Iterator[Step]:
    """Yield steps first..last in order, prepared while the device works."""
    if not workers:
        yield from _in_a_thread(reader, first, last)
        return
    numbers = range(first, last + 1)
    wanted = (request for number in numbers for request in reader.requests(number))
    tensors = load(reader.micro_batches, wanted, workers, reader.pin)
    for number in numbers:
        yield reader.read(number, tensors)


def load(
    micro_batches: MicroBatches, requests: Iterable[Request], workers: int, pin: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The tensors of these micro-batches in order, from so many processes, or from this one (0).

    `pin`: what comes from processes is pinned, in a thread of the DataLoader.
    """
    if not workers:
        yield from map(micro_batches.__getitem__, requests)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["drumline.train.read_ahead", *micro_batches.imports])
    options: dict[str, Any] = {"multiprocessing_context": context, "prefetch_factor": _PER_WORKER}
    loader: DataLoader[Any] = DataLoader(
        micro_batches,  # type: ignore[arg-type]
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=partial(_be_a_worker, Process.current()),
        **options,
    )
    yield from loader


def _be_a_worker(rank: Process, worker: int) -> None:
    """Leave signals to the rank, which saves and then ends its workers; end when it is gone.

    torch's own watch is for the parent, which here is the server that workers are forked from: it lives as
    long as they do.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)

    def look() -> None:
        while rank.is_alive:
            time.sleep(_RANK_POLL_S)
        os._exit(1)

    threading.Thread(target=look, name="rank", daemon=True).start()


def _in_a_thread(reader: StepReader, first: int, last: int) -> Iterator[Step]:
    """Yield steps first..last in order, prepared in a thread."""
    waiting: queue.Queue[Step | BaseException] = queue.Queue(maxsize=READ_AHEAD_STEPS)
    stopped = threading.Event()

    def put(item: Step | BaseException) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in range(first, last + 1):
                put(reader.read(number))
                if stopped.is_set():
                    return
        except BaseException as error:  # passed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        for _ in range(first, last + 1):
            item = waiting.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
