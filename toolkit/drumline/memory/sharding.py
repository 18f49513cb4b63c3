"""FSDP2 on a ledger: when groups of weights are all-gathered and freed, and gradients reduce-scattered.

Follows torch/distributed/fsdp/_fully_shard. A group is gathered into one buffer and copied out to its
parameters; in the forward the buffer is freed after the next group was gathered. In the backward the next
group is prefetched. Gradients are copied, in the reduction's dtype, into a buffer that is freed when the
next group starts its own reduce-scatter.
"""

from collections.abc import Collection

from drumline.architectures.shapes import Tensors, shard_sizes
from drumline.architectures.trained import packed_bytes
from drumline.memory.ledger import Block, Gradient, Ledger, Parameter, Value
from drumline.memory.load import Load

_PART = "communication"
_GATHERING, _REDUCING = 1, 2
"""FSDP2's side streams, on which it gathers and reduces; what they free does not serve the main stream 0."""


class Stage:
    """Buffers that outlive their group: until the next group replaces them, or the backward ends."""

    def __init__(self) -> None:
        self.gathered: Block | None = None
        self.reduced: Block | None = None
        self.all_reduced: list[Block] = []


class Group:
    """Weights that are gathered together: one layer's, an encoder's embeddings, or the rest of the model."""

    def __init__(
        self,
        ledger: Ledger,
        load: Load,
        stage: Stage,
        tensors: Tensors,
        weights: list[Parameter],
        frozen: Collection[str],
        packed: Collection[str] = (),
    ) -> None:
        """`tensors`: those of the weights, by name; `frozen`: names of those that are not trained.

        `packed`: of the frozen ones those that are quantised.
        """
        self._ledger, self._load, self._stage, self.weights = ledger, load, stage, weights
        sizes = shard_sizes(load.shape, tensors, load.shard_ranks, load.folds)
        self.tensors = [
            size * self._share(name, tensors[name], name in frozen and name in packed)
            for name, size in zip(tensors, sizes, strict=True)
        ]
        self.shard = sum(self.tensors)
        pairs = zip(tensors, self.tensors, strict=True)
        self.trained = sum(size for name, size in pairs if name not in frozen)
        self._whole: list[Block] = []
        self._buffer: Block | None = None
        self.gradient: Block | None = None
        self._accumulated: Block | None = None

    def _share(self, name: str, sizes: tuple[int, ...], is_packed: bool) -> float:
        """Bytes of a quantised weight over those of the forward's dtype; 1 for another one."""
        load = self._load
        packed = packed_bytes(load.shape, name, sizes) if is_packed else None
        return 1.0 if packed is None else packed / load.forward_width

    def gather(self) -> None:
        """All-gather into one buffer; the shard is cast to the forward's dtype first if it differs."""
        ledger, load = self._ledger, self._load
        if load.shard_ranks == 1 or self._whole:  # a single rank has nothing to gather
            return
        narrow = load.forward_width != load.state_width
        width = load.forward_width
        sent = ledger.block(self.trained, width, _PART, _GATHERING) if narrow else None
        self._buffer = ledger.block(self.shard * load.shard_ranks, width, _PART, _GATHERING)
        del sent

    def open(self, in_backward: bool = False) -> None:
        """Copy the gathered buffer out to the parameters; only the forward keeps the buffer for longer."""
        if self._whole:
            return
        if self._buffer is None:
            self.gather()
        ranks, width = self._load.shard_ranks, self._load.forward_width
        self._whole = [self._ledger.block(size * ranks, width, _PART) for size in self.tensors]
        self._stage.gathered = None if in_backward else self._buffer
        self._buffer = None

    @property
    def whole_bytes(self) -> int:
        """Bytes of the unsharded parameters that are held now."""
        return sum(block.size for block in self._whole)

    def close_after_forward(self) -> None:
        """Free the unsharded parameters, unless the backward uses them again."""
        if not self._load.keeps_weights:
            self.close()

    def close(self) -> None:
        """Free the unsharded parameters."""
        self._whole = []

    def accumulate_whole(self) -> None:
        """Hold the unsharded gradients of earlier micro-batches."""
        width = self._load.reduced_width
        elements = self.trained * self._load.shard_ranks
        self._accumulated = self._ledger.block(elements, width, "gradients")

    def reduce(self) -> None:
        """Reduce-scatter the gradients; the shard becomes the gradient or is added to the existing one."""
        ledger, load = self._ledger, self._load
        width = load.reduced_width
        if not load.stays_gathered:
            self.close()
        if not self.trained:
            return
        self._stage.reduced = None
        self._stage.reduced = ledger.block(self.trained * load.shard_ranks, width, _PART)
        self._accumulated = None
        for weight in self.weights:
            weight.gradient = None
        kept = 0 if load.keeps_gradients else self.trained
        self.gradient = ledger.block(kept, width, "gradients", _REDUCING)
        if load.keeps_gradients:
            self.hold_all_reduced(self.trained)

    def hold_all_reduced(self, elements: float) -> None:
        """Allocate reduced shards of so many elements, which are added to existing gradients.

        Sharded within nodes, they are also all-reduced between nodes and live until the backward ends.
        """
        width = self._load.reduced_width
        block = self._ledger.block(elements, width, _PART, _REDUCING)
        if self._load.shard_ranks < self._load.ranks:
            self._stage.all_reduced.append(block)

    def before_backward(self, value: Value, ahead: "Group | None") -> Value:
        """Insert a node that runs before this group's backward: opens it and prefetches `ahead`."""

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            self.open(in_backward=True)
            if ahead is not None:
                ahead.gather()
            return gradient

        return self._ledger.wrap(value.block, value.elements, value.width, [value], rule)

    def after_backward(self, value: Value) -> Value:
        """Insert a node that runs after this group's backward and reduces its gradients."""

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            self.reduce()
            return gradient

        return self._ledger.wrap(value.block, value.elements, value.width, [value], rule)
