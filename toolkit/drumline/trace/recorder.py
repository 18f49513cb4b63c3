"""Records every allocation and release of a storage, in order, on fake or real tensors. Imports torch.

A `Recorder` sees operators through torch's dispatch mode and storages through weak references, so like the
CUDA allocator it counts what autograd keeps alive. It does not see what a kernel allocates internally; the
kernels for which that matters have stand-ins in `toolkit/drumline/trace/kernels.py`.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from drumline.memory.events import FREE
from drumline.memory.recording import Birth, Recording

_DESUGARED = ("DTensor", "AsyncCollectiveTensor")
"""Tensor subclasses whose operators must first be decomposed into ones on local tensors."""


class Recorder(TorchDispatchMode):
    """Context that records allocations; `adopt` adds storages that already exist."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self._numbers: dict[int, int] = {}  # of live storages, by address
        self._watchers: dict[int, Any] = {}
        self._living: set[int] = set()
        self._paused = False
        self._phase = ""
        self._streams: dict[int, int] = {}
        self._stream = 0

    @contextmanager
    def paused(self, paused: bool = True) -> Iterator[None]:
        """Context in which nothing is recorded; with `paused=False`, recording resumes in it."""
        before, self._paused = self._paused, paused
        try:
            yield
        finally:
            self._paused = before

    def adopt(self, tensors: Iterable[Tensor], operator: str) -> None:
        """Record storages that were allocated while paused."""
        for tensor in tensors:
            self._take_in(_local(tensor), operator)

    @contextmanager
    def on_stream(self, key: int) -> Iterator[None]:
        """Context whose allocations belong to another stream; other streams cannot reuse its free blocks."""
        before = self._stream
        self._stream = self._streams.setdefault(key, len(self._streams) + 1)
        try:
            yield
        finally:
            self._stream = before

    def phase(self, name: str) -> None:
        """Set the memory phase from here on."""
        if name != self._phase:
            self._phase = name
            self.recording.phases.append((len(self.recording.events), name))

    def label(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Label the storages of these tensors with the part of memory that they belong to."""
        for tensor in tensors:
            if tensor is not None:
                number = self._numbers.get(_local(tensor).untyped_storage()._cdata)
                if number is not None:
                    self.recording.parts[number] = part

    def __enter__(self) -> Any:
        self._resize = UntypedStorage.resize_
        recorder = self

        def resize(storage: UntypedStorage, size: int) -> Any:
            result = recorder._resize(storage, size)  # FSDP2 frees and reallocates this way
            recorder._resized(storage, size)
            return result

        UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and record the storages that it allocated."""
        if any(getattr(kind, "__name__", "") in _DESUGARED for kind in types):
            return NotImplemented
        if func is torch.ops.aten.add.Tensor and _is_accumulation(*args):
            func = torch.ops.aten.add_.Tensor
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            for value in tree_iter(result):
                if isinstance(value, Tensor) and value.device.type != "meta":
                    self._take_in(value, func)
        return result

    def _take_in(self, tensor: Tensor, operator: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return
        self._watchers[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))  # type: ignore[misc]
        self._born(key, storage.nbytes(), str(operator), tuple(tensor.shape), str(tensor.dtype))

    def _resized(self, storage: UntypedStorage, size: int) -> None:
        key = storage._cdata
        if self._paused or key not in self._numbers:
            return
        birth = self.recording.births[self._numbers[key]]
        self._end(key)
        self._born(key, size, "resize_", birth.shape, birth.dtype)

    def _born(self, key: int, size: int, operator: str, shape: tuple[int, ...], dtype: str) -> None:
        number = len(self.recording.births)
        self._numbers[key] = number
        self.recording.births.append(Birth(self._phase, operator, shape, dtype))
        if size:
            self.recording.events.append((number, size, self._stream))
            self._living.add(number)

    def _gone(self, key: int) -> None:
        self._watchers.pop(key, None)
        self._end(key)

    def _end(self, key: int) -> None:
        number = self._numbers.pop(key, None)
        if number is not None and number in self._living:
            self._living.remove(number)
            self.recording.events.append((number, FREE, 0))


def _is_accumulation(one: Any, other: Any) -> bool:
    """Whether this addition is autograd accumulating two gradients of one tensor.

    Autograd does that in place, but not under a dispatch mode, and not into an expanded tensor
    (torch/csrc/autograd/input_buffer.cpp).
    """
    return (
        torch._C._current_graph_task_id() != -1
        and not torch.is_grad_enabled()
        and isinstance(other, Tensor)
        and (one.shape, one.dtype) == (other.shape, other.dtype)
        and torch.ops.aten.is_non_overlapping_and_dense(one)
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
