"""Simulates one rank's attempt on a ledger: load, one micro-batch, optimizer step, evaluation."""

from functools import cache

from drumline.architectures.shapes import count, layer_tensors, outer_tensors, sharded
from drumline.memory import zero
from drumline.memory.families import Rows
from drumline.memory.ledger import Block, Ledger
from drumline.memory.load import Load
from drumline.memory.network import Network
from drumline.memory.operators import FP32, INDEX
from drumline.phases import MemoryPhase


class Rank:
    """One rank's allocations: those that live for the whole attempt, and those of single phases."""

    def __init__(self, load: Load) -> None:
        self.load, self.shape = load, load.shape
        self.ledger = Ledger()
        self.network = Network(self.ledger, load)
        self._held: list[Block] = []
        self._gradients: list[Block] = []

    def play(self) -> Ledger:
        """Simulate the attempt from building the model to evaluation."""
        ledger, load = self.ledger, self.load
        self._build()
        ledger.enter(MemoryPhase.FORWARD)
        if load.keeps_gradients:
            self._allocate_gradients()
        self._micro_batch()
        ledger.enter(MemoryPhase.OPTIMIZER_STEP)
        self._optimizer_scratch(load.has_scratch_in_a_step)
        self._gradients.clear()
        self.network.forget_gradients()
        if load.evaluation:
            ledger.enter(MemoryPhase.EVALUATION)
            self._evaluate()
        ledger.enter(MemoryPhase.SAVE)  # copies to host memory; allocates nothing on the device
        return ledger

    def _hold(self, elements: float, width: int, name: str) -> None:
        self._held.append(self.ledger.block(elements, width, name))

    def _own_elements(self) -> int:
        """Elements of the weights that this rank's optimizer updates: all of them, or its shards."""
        load, ranks = self.load, self.load.shard_ranks
        if load.strategy == "fsdp":
            outer, layer = (sharded(f(self.shape), ranks) for f in (outer_tensors, layer_tensors))
            return outer + self.shape.layers * layer
        return -(-self.shape.parameters // ranks) if load.is_zero else self.shape.parameters

    @property
    def _has_buckets(self) -> bool:
        return self.load.strategy == "ddp" and self.load.ranks > 1

    def _build(self) -> None:
        """Allocate the weights, then the optimizer state, which a step on zero gradients creates."""
        ledger, load, own = self.ledger, self.load, self._own_elements()
        ledger.enter(MemoryPhase.LOAD)
        whole = load.strategy in ("zero1", "zero2")
        self._hold(self.shape.parameters if whole else own, load.state_width, "parameters")
        if self._has_buckets:
            self._hold(own, load.state_width, "gradients")
        if load.strategy == "fsdp":  # weights outside the layers exist whole before sharding
            ledger.block(count(outer_tensors(self.shape)), load.state_width, "parameters")
        gradients = ledger.block(own, load.state_width, "gradients")
        if not load.offload:
            copies = load.optimizer_states + int(load.is_zero)  # ZeRO copies its partition
            self._hold(copies * own, load.state_width, "optimizer")
        self._optimizer_scratch(load.has_scratch)
        del gradients
        if load.strategy == "zero3":
            self._hold(zero.gathered(load) + zero.buckets(load), 1, "communication")
        elif load.strategy == "zero1" and load.accumulation > 1:
            self._hold(zero.buckets(load), 1, "communication")

    def _optimizer_scratch(self, is_needed: bool) -> None:
        """The temporary of a foreach optimizer step, as large as this rank's parameters."""
        if is_needed:
            self.ledger.block(self._own_elements(), self.load.state_width, "optimizer")

    def _allocate_gradients(self) -> None:
        """Allocate the gradients that persist between micro-batches; DDP's are in its buckets already."""
        if not self._has_buckets:
            elements = zero.gradients(self.load) if self.load.is_zero else self._own_elements()
            self._gradients.append(self.ledger.block(elements, self.load.state_width, "gradients"))
        if self.load.strategy != "fsdp":
            for parameter in self.network.parameters():
                parameter.gradient = self.ledger.block(0, 1)

    def _rows(self, samples: int) -> Rows:
        load = self.load
        length = self.shape.tokens(load.sequence_length)
        return Rows(samples, length, load.kernel, load.is_masked)

    def _micro_batch(self) -> None:
        """Forward, loss and backward."""
        rows = self._rows(self.load.per_device)
        inputs = self._inputs(rows)
        with self.network.run.autocast():
            loss = self.network.forward(rows)
        self.ledger.enter(MemoryPhase.BACKWARD)
        size = zero.buckets(self.load) if zero.buckets_come_and_go(self.load) else 0
        buckets = self.ledger.block(size, 1, "communication")
        self.network.backward(loss)
        del inputs, buckets

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
