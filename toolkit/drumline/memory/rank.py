"""Simulates one rank's attempt on a ledger: load, one micro-batch, optimizer step, evaluation."""

import math
from functools import cache, cached_property

from drumline.architectures.shapes import count, outer_tensors, shard_sizes
from drumline.architectures.trained import packed_bytes, weights_of
from drumline.memory.events import Event
from drumline.memory.families import Rows
from drumline.memory.ledger import Block, Ledger
from drumline.memory.load import Load, StateSize
from drumline.memory.network import Network
from drumline.memory.operators import FP32, INDEX
from drumline.memory.zero import Zero, largest, partition
from drumline.phases import MemoryPhase
from drumline.units import MIB

_BUCKET_BYTES = 25 * MIB
"""DDP's buckets hold 25 MiB of gradients."""


class Rank:
    """One rank's allocations: those that live for the whole attempt, and those of single phases.

    `is_whole`: every layer is simulated, every tensor is a block of its own, and the ledger keeps events.
    """

    def __init__(self, load: Load, is_whole: bool = False) -> None:
        self.load, self.shape, self._is_whole = load, load.shape, is_whole
        self.ledger = Ledger(keeps_events=is_whole)
        self.network = Network(self.ledger, load, is_whole)
        self._zero = Zero(self.ledger, load) if load.is_zero else None
        self._held: list[Block] = []
        self._gradients: list[Block] = []

    def play(self) -> Ledger:
        """Simulate the attempt from building the model to evaluation.

        The warm-up is left out: replayed before the step, it changes reserved bytes by at most 0.3 %.
        """
        ledger, load = self.ledger, self.load
        self._build()
        if load.keeps_gradients:
            self._allocate_gradients()
        self._micro_batch()
        ledger.enter(MemoryPhase.OPTIMIZER_STEP)
        self._step()
        self._gradients.clear()
        self.network.forget_gradients()
        if load.evaluation and (load.evaluation > load.per_device or not self._is_whole):
            ledger.enter(MemoryPhase.EVALUATION)
            self._evaluate()
        ledger.enter(MemoryPhase.SAVE)  # copies to host memory; allocates nothing on the device
        return ledger

    def _hold(self, elements: float, width: int, name: str) -> None:
        self._held.append(self.ledger.block(elements, width, name))

    def _per_tensor(self, name: str) -> list[Block]:
        """A block for each of this rank's trained weights, in the stored precision; one if not whole."""
        sizes = self._own_tensors if self._is_whole else [sum(self._own_tensors)]
        return [self.ledger.block(size, self.load.state_width, name) for size in sizes]

    @cached_property
    def _own_tensors(self) -> list[int]:
        """Elements of each weight that this rank's optimizer updates; ZeRO's partition is a flat one."""
        return [partition(self.load)] if self.load.is_zero else self._shards(is_frozen=False)

    def _shards(self, is_frozen: bool) -> list[int]:
        """Elements of this rank's part of each weight that is trained, or of each frozen one."""
        load, shape = self.load, self.shape
        ranks = load.shard_ranks if load.strategy == "fsdp" else 1
        found = []
        for run in weights_of(shape, is_frozen):
            found += run.number * shard_sizes(shape, run.tensors, ranks, load.folds)
        return found

    def _frozen_bytes(self) -> list[float]:
        """Bytes of this rank's part of each frozen weight."""
        widths = [
            packed_bytes(self.shape, name, sizes) if run.is_layer else None
            for run in weights_of(self.shape, is_frozen=True)
            for _ in range(run.number)
            for name, sizes in run.tensors.items()
        ]
        pairs = zip(self._shards(is_frozen=True), widths, strict=True)
        return [size * (width or self.load.frozen_width) for size, width in pairs]

    def _state_tensors(self, state: StateSize) -> list[float]:
        """Bytes of this rank's part of one optimizer state tensor, of each trained weight."""
        parts = [
            state.bytes_of(sizes, run.is_layer) / math.prod(sizes)
            for run in weights_of(self.shape, is_frozen=False)
            for _ in range(run.number)
            for sizes in run.tensors.values()
        ]
        return [part * size for part, size in zip(parts, self._own_tensors, strict=True)]

    @property
    def _has_buckets(self) -> bool:
        return self.load.strategy == "ddp" and self.load.ranks > 1

    def _build(self) -> None:
        """Allocate the weights, then the optimizer state, which a step on zero gradients creates."""
        ledger, load, own = self.ledger, self.load, sum(self._own_tensors)
        ledger.enter(MemoryPhase.LOAD)
        if self._zero:
            self._zero.hold_state()
        else:
            self._held += self._per_tensor("parameters")
            frozen = self._frozen_bytes()
            for part in frozen if self._is_whole else [sum(frozen)] if frozen else []:
                self._hold(part, 1, "parameters")
        if self._has_buckets:
            size = _BUCKET_BYTES // load.state_width if self._is_whole else own
            for start in range(0, own, size):
                self._hold(min(size, own - start), load.state_width, "gradients")
        if load.strategy == "fsdp":  # weights outside the layers exist whole before sharding
            ledger.block(count(outer_tensors(self.shape)), load.state_width, "parameters")
        if load.offload:
            return
        gradients = self._per_tensor("gradients")
        for state in () if self._zero else load.optimizer_states:
            sizes = self._state_tensors(state)
            for part in sizes if self._is_whole else [sum(sizes)]:
                self._hold(part, 1, "optimizer")
        self._optimizer_scratch(load.has_scratch)
        del gradients

    def _step(self) -> None:
        if self._zero:
            self._zero.step(self.load.has_scratch_in_a_step)
        else:
            self._optimizer_scratch(self.load.has_scratch_in_a_step)

    def _optimizer_scratch(self, is_needed: bool) -> None:
        """The temporaries of an optimizer step: of all parameters at once, or of one at a time."""
        if is_needed:
            self._per_tensor("optimizer")
        if self.load.scratch_of_largest:
            own = largest(self.load) if self.load.gathers_to_step else max(self._own_tensors)
            size = min(own, self.load.scratch_at_most or own) * self.load.scratch_of_largest
            self.ledger.block(size, FP32, "optimizer")

    def _allocate_gradients(self) -> None:
        """Allocate the gradients that persist between micro-batches; DDP's are in its buckets already."""
        if self._zero:
            return
        if not self._has_buckets:
            self._gradients += self._per_tensor("gradients")
        if self.load.strategy != "fsdp":
            for parameter in self.network.parameters():
                parameter.gradient = self.ledger.block(0, 1)

    def _rows(self, samples: int) -> Rows:
        load = self.load
        length = self.shape.tokens(load.sequence_length)
        return Rows(samples, length, load.kernel(load.is_masked), load.is_masked)

    def _micro_batch(self) -> None:
        """Forward, loss and backward."""
        self.ledger.enter(MemoryPhase.FORWARD)
        gathered: list[Block] = []
        if self._zero:
            gathered = self._zero.start_micro_batch(self.network.parameters())
        self.network.begin()
        rows = self._rows(self.load.per_device)
        inputs = self._inputs(rows)
        with self.network.run.autocast():
            loss = self.network.forward(rows)
        self.ledger.enter(MemoryPhase.BACKWARD)
        self.network.backward(loss)
        del inputs, gathered
        if self._zero:
            self._zero.finish_backward()

    def _evaluate(self) -> None:
        assert self.load.evaluation
        rows = self._rows(self.load.evaluation)
        self.ledger.is_recording = False
        inputs = self._inputs(rows)
        with self.network.run.autocast():
            self.network.forward(rows)
        del inputs
        self.ledger.is_recording = True

    def _inputs(self, rows: Rows) -> Block:
        """Allocate the inputs: fp32 pixels of images, or int64 token ids and targets."""
        if self.shape.patches:
            pixels = rows.samples * self.shape.patches * self.shape.patch_inputs
            return self.ledger.block(pixels, FP32)
        return self.ledger.block(2 * rows.tokens, INDEX)


@cache
def play(load: Load) -> Ledger:
    """The ledger after a simulated attempt; cached, because the search for a split repeats loads."""
    return Rank(load).play()


@cache
def events(load: Load) -> list[Event]:
    """Every allocation and free of a simulated attempt, in order."""
    return Rank(load, is_whole=True).play().events
