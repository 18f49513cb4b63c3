"""Simulates autograd with tensor sizes only, to find the peak of live bytes on a rank. Pure, no torch.

An operation allocates a block and states what it saves for its backward and what its backward
allocates. A block is freed when the last Python reference to it is dropped, as in torch. The ledger
sums the live bytes after every operation; the largest sum is the peak.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from drumline.memory.events import FREE, ROUND, Event

Gradient = Any
"""A Block, a tuple of blocks if the operation had several outputs, or None."""

Rule = Callable[[list[Gradient]], Sequence[Gradient]]
"""Maps the output's gradient to the inputs' gradients. The argument is a list of one, so that the rule can
pop it and thereby free the gradient."""


class Block:
    """An allocation, freed when its last reference is dropped; `width` is bytes per element.

    A view keeps its `base` alive, the block that it is a view of, and takes no memory itself.
    """

    __slots__ = ("_ledger", "_number", "base", "elements", "part", "size", "width")
    base: "Block"

    def __init__(
        self, ledger: "Ledger", elements: float, width: int, part: str, stream: int
    ) -> None:
        self._ledger, self.elements, self.width, self.part = ledger, elements, width, part
        self.size = size = -(-int(elements * width) // ROUND) * ROUND
        ledger._count = self._number = number = ledger._count + 1
        if not ledger._keeps_events:
            ledger._add(size, part)
        elif size:
            ledger.events.append((number, size, stream))

    def view(self, elements: float) -> "Block":
        """A view of some of its elements, which keeps it alive."""
        part = Block(self._ledger, 0, self.width, self.part, 0)
        part.elements, part.base = elements, self
        return part

    def __del__(self) -> None:
        ledger, size = self._ledger, self.size
        if not ledger._keeps_events:
            ledger._add(-size, self.part)
        elif size:
            ledger.events.append((self._number, FREE, 0))


class Parameter:
    """A weight: its number of elements, bytes per element, and its gradient, None before the first.

    `uses` counts the gradients still expected in this backward. As in autograd, they are summed in
    `waiting` first, and the sum is then added to `gradient`. `on_ready` is called when it has been.
    `is_frozen`: it is not trained and gets no gradient. `adapter`: the low-rank matrices beside it.
    `is_packed`: it is quantised, and widened for every product.
    """

    __slots__ = (
        "adapter",
        "elements",
        "gradient",
        "is_frozen",
        "is_packed",
        "on_ready",
        "uses",
        "waiting",
        "width",
    )

    def __init__(
        self,
        elements: float,
        width: int,
        is_frozen: bool = False,
        adapter: "AdapterWeights | None" = None,
        is_packed: bool = False,
    ) -> None:
        self.elements, self.width = elements, width
        self.is_frozen, self.adapter, self.is_packed = is_frozen, adapter, is_packed
        self.gradient: Block | None = None
        self.waiting: Block | None = None
        self.on_ready: Callable[[], None] | None = None
        self.uses = 0

    @property
    def source(self) -> "Parameter | None":
        """What the gradient of an operation on it is for: itself, or nothing."""
        return None if self.is_frozen else self


@dataclass(frozen=True)
class AdapterWeights:
    """LoRA's two matrices beside a frozen one, [in, rank] and [rank, out]; DoRA's magnitudes [out]."""

    first: Parameter
    second: Parameter
    rank: int
    dropout: float
    magnitude: Parameter | None = None

    def all_weights(self) -> list[Parameter]:
        """Every parameter of the adapter."""
        return [self.first, self.second, *([self.magnitude] if self.magnitude else [])]


class Node:
    """One operation in the backward graph.

    `rule` computes one gradient per source (a Node, a Parameter or None); `keeps` are the blocks saved
    for it; `widths` are the bytes per element of the gradient that each source expects.
    """

    __slots__ = ("keeps", "rule", "sources", "widths")

    def __init__(self, sources: Sequence[Any], widths: Sequence[int],
                 keeps: Sequence[Block | None], rule: Rule) -> None:  # fmt: skip
        self.sources, self.widths, self.keeps, self.rule = sources, widths, keeps, rule


class Value:
    """A tensor: its block, and its source.

    The source is the Node that produced it, the Parameter that it is, or None if it needs no gradient.
    """

    __slots__ = ("block", "elements", "source", "width")

    def __init__(self, block: Block | None, elements: float, width: int, source: Any) -> None:
        self.block, self.elements, self.width, self.source = block, elements, width, source


class Ledger:
    """Live bytes in total and by part, with the peak overall and the peak of each phase.

    With `keeps_events`, instead of all these, `events` holds every allocation and free in order.
    """

    def __init__(self, keeps_events: bool = False) -> None:
        self.events: list[Event] = []
        self._keeps_events, self._count = keeps_events, 0
        self.live = self.peak = 0
        self.part, self.phase = "activations", ""
        self.peak_phase = ""
        self.peak_parts: dict[str, int] = {}
        self.phase_peaks: dict[str, int] = {}
        self.nodes: list[Node] = []
        self.is_recording = True
        self.frees_early = False  # checkpointing frees a recomputed activation once it was used
        self._parts: dict[str, int] = defaultdict(int)
        self._waiting: dict[int, Gradient] = {}

    def enter(self, phase: str) -> None:
        """Start a phase; what is live already counts towards its peak."""
        self.phase = phase
        self._add(0, self.part)

    def _add(self, size: int, part: str) -> None:
        self.live += size
        self._parts[part] += size
        if size >= 0:
            if self.live > self.peak:
                self.peak, self.peak_phase = self.live, self.phase
                self.peak_parts = dict(self._parts)
            if self.live > self.phase_peaks.get(self.phase, 0):
                self.phase_peaks[self.phase] = self.live

    def block(self, elements: float, width: int, part: str | None = None, stream: int = 0) -> Block:
        """Allocate a block of `elements` × `width` bytes, counted under `part` (default: the current one).

        `stream`: of the allocator model, which reuses a free block on its own stream only.
        """
        return Block(self, elements, width, part or self.part, stream)

    def make(
        self,
        elements: float,
        width: int,
        inputs: Sequence[Value] = (),
        rule: Rule | None = None,
        keeps: Sequence[Block | None] = (),
        keeps_itself: bool = False,
    ) -> Value:
        """The output of an operation, in a newly allocated block."""
        block = self.block(elements, width)
        return self.wrap(
            block, elements, width, inputs, rule, (*keeps, block) if keeps_itself else keeps
        )

    def wrap(
        self,
        block: Block | None,
        elements: float,
        width: int,
        inputs: Sequence[Value],
        rule: Rule | None,
        keeps: Sequence[Block | None] = (),
    ) -> Value:
        """The output of an operation that allocates nothing: a view of `block`."""
        source = None
        if self.is_recording and rule:
            sources = [value.source for value in inputs]
            is_needed = False
            for one in sources:
                if one is not None:
                    is_needed = True
                    if isinstance(one, Parameter):
                        one.uses += 1
            if is_needed:
                source = Node(sources, [value.width for value in inputs], keeps, rule)
                self.nodes.append(source)
        return Value(block, elements, width, source)

    def backward(self, root: Value, gradient: Gradient, since: int = 0) -> None:
        """Run the backward of all nodes after the first `since` ones, in reverse order.

        Gradients for earlier nodes are kept until a later call runs those nodes.
        """
        waiting = self._waiting
        waiting[id(root.source)] = gradient
        del gradient
        while len(self.nodes) > since:
            node = self.nodes.pop()
            handed = [waiting.pop(id(node), None)]
            if handed[0] is None:
                continue
            results = list(node.rule(handed))
            if self.frees_early:
                node.keeps = ()
            for place, width in enumerate(node.widths):
                found = results[place]
                if isinstance(found, Block) and found.width != width:  # a cast to its input's dtype
                    results[place] = self.block(found.elements, width, found.part)
                del found
            del handed  # as in torch, the incoming gradient lives until the outgoing ones are cast
            for place, source in enumerate(node.sources):
                result, results[place] = results[place], None
                if source is None or result is None:
                    continue
                if isinstance(source, Parameter):
                    self._accumulate(source, result)
                else:
                    # Two gradients of one tensor are added in place, so only the first stays allocated.
                    waiting.setdefault(id(source), result)
                del result
            node.keeps, node.rule = (), _spent

    def _accumulate(self, parameter: Parameter, gradient: Block) -> None:
        """Store a parameter's first gradient; later ones are added to it in place and free their block."""
        parameter.uses -= 1
        if parameter.waiting is None:
            parameter.waiting = gradient
        if parameter.uses > 0:
            return
        arrived, parameter.waiting = parameter.waiting, None
        if parameter.gradient is None:
            self._parts[arrived.part] -= arrived.size
            arrived.part = "gradients"
            self._parts["gradients"] += arrived.size
            parameter.gradient = arrived
        del arrived
        if parameter.on_ready:
            parameter.on_ready()


def _spent(gradient: list[Gradient]) -> Sequence[Gradient]:
    raise AssertionError("a node's backward runs once")
