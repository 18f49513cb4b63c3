"""FSDP2 on a ledger: when a group of weights is gathered, freed, and its gradients scattered.

As torch/distributed/fsdp/_fully_shard does it: gathered into one buffer and copied out to the
parameters; the buffer is let go when the next group has arrived. In the backward the next group is
gathered ahead. Gradients are copied, in the type of the reduction, into a buffer that stays until the
next group has filled its own.
"""

from drumline.architectures.shapes import Tensors, sharded
from drumline.memory.ledger import Block, Gradient, Ledger, Parameter, Value
from drumline.memory.load import Load

_PART = "communication"


class Stage:
    """What the groups share: buffers that wait for the next one, or for the end of the backward."""

    def __init__(self) -> None:
        self.gathered: Block | None = None
        self.reduced: Block | None = None
        self.all_reduced: list[Block] = []


class Group:
    """The weights that are gathered together: one layer's, or all outside the layers."""

    def __init__(
        self, ledger: Ledger, load: Load, stage: Stage, tensors: Tensors, weights: list[Parameter]
    ) -> None:
        self._ledger, self._load, self._stage, self.weights = ledger, load, stage, weights
        self.shard = sharded(tensors, load.shard_ranks)
        self._whole: Block | None = None
        self._buffer: Block | None = None
        self.gradient: Block | None = None

    def gather(self) -> None:
        """Into one buffer; the shard is narrowed first where types differ."""
        ledger, load = self._ledger, self._load
        if load.shard_ranks == 1:  # nobody to gather from
            return
        narrow = load.forward_width != load.state_width
        sent = ledger.block(self.shard, load.forward_width, _PART) if narrow else None
        self._buffer = ledger.block(self.shard * load.shard_ranks, load.forward_width, _PART)
        del sent

    def open(self, in_backward: bool = False) -> None:
        """Copy out to the parameters; the buffer is held on in the forward only."""
        if self._whole is not None:
            return
        if self._buffer is None:
            self.gather()
        padded = self.shard * self._load.shard_ranks
        self._whole = self._ledger.block(padded, self._load.forward_width, _PART)
        self._stage.gathered = None if in_backward else self._buffer
        self._buffer = None

    def close(self) -> None:
        """Free the whole parameters."""
        self._whole = None

    def reduce(self) -> None:
        """Scatter the gradients: what is left is the shard's, kept or added to what is there."""
        ledger, load = self._ledger, self._load
        width = 4 if load.low else load.state_width
        self.close()
        self._stage.reduced = None
        self._stage.reduced = ledger.block(self.shard * load.shard_ranks, width, _PART)
        for weight in self.weights:
            weight.gradient = None
        self.gradient = ledger.block(0 if load.keeps_gradients else self.shard, width, "gradients")
        if load.keeps_gradients:
            self.hold_all_reduced(1)

    def hold_all_reduced(self, times: int) -> None:
        """What is added to gradients that are there; reduced over nodes, it stays until the end."""
        width = 4 if self._load.low else self._load.state_width
        block = self._ledger.block(times * self.shard, width, _PART)
        if self._load.shard_ranks < self._load.ranks:
            self._stage.all_reduced.append(block)

    def before_backward(self, value: Value, ahead: "Group | None") -> Value:
        """Where this group's backward begins: it is opened, and the next one gathered ahead."""

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            self.open(in_backward=True)
            if ahead is not None:
                ahead.gather()
            return gradient

        return self._ledger.wrap(value.block, value.elements, value.width, [value], rule)

    def after_backward(self, value: Value) -> Value:
        """Where this group's backward ends."""

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            self.reduce()
            return gradient

        return self._ledger.wrap(value.block, value.elements, value.width, [value], rule)
