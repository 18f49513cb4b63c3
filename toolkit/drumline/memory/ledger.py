"""Bytes alive on a rank, step by step, through a forward and its backward. Pure, no torch.

A `Ledger` is autograd reduced to sizes: an operation makes a block, says what it keeps for its
backward and what its backward allocates; a block ends when the last reference to it goes, as in
torch. So the bytes at any moment follow from the operations alone, and their largest is the peak.
"""

from collections.abc import Callable, Sequence
from typing import Any

ROUND = 512
"""The CUDA allocator's granularity in bytes."""

Gradient = Any
"""A Block, a tuple of blocks where an operation had several outputs, or None."""

Rule = Callable[[list[Gradient]], Sequence[Gradient]]
"""From the gradient of the output, handed over in a list of one, to those of the inputs."""


class Block:
    """Bytes on the device, from here until nobody refers to them; `width` is bytes an element."""

    __slots__ = ("_ledger", "elements", "part", "size", "width")

    def __init__(self, ledger: "Ledger", elements: float, width: int, part: str) -> None:
        self._ledger, self.elements, self.width, self.part = ledger, elements, width, part
        self.size = -(-int(elements * width) // ROUND) * ROUND
        ledger._add(self.size, part)

    def __del__(self) -> None:
        self._ledger._add(-self.size, self.part)


class Parameter:
    """A weight of the forward: how many elements, bytes of each, and its gradient once there is one.

    `uses` counts the gradients that are still to come in this backward: autograd adds them up in
    `waiting` and only then to what is there.
    """

    __slots__ = ("elements", "gradient", "uses", "waiting", "width")

    def __init__(self, elements: float, width: int) -> None:
        self.elements, self.width = elements, width
        self.gradient: Block | None = None
        self.waiting: Block | None = None
        self.uses = 0


class Node:
    """One operation's part in the backward.

    `rule` makes a gradient for every source (a Node, a Parameter or None); `keeps` are the blocks
    that it needs until then; `widths` are bytes an element that the sources expect.
    """

    __slots__ = ("keeps", "rule", "sources", "widths")

    def __init__(self, sources: Sequence[Any], widths: Sequence[int],
                 keeps: Sequence[Block | None], rule: Rule) -> None:  # fmt: skip
        self.sources, self.widths, self.keeps, self.rule = sources, widths, keeps, rule


class Value:
    """A tensor: its block, and the node that made it (or the parameter it is, or None)."""

    __slots__ = ("block", "elements", "source", "width")

    def __init__(self, block: Block | None, elements: float, width: int, source: Any) -> None:
        self.block, self.elements, self.width, self.source = block, elements, width, source


class Ledger:
    """The running total, its parts, and the largest total of each phase."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.part, self.phase = "activations", ""
        self.peak_phase = ""
        self.peak_parts: dict[str, int] = {}
        self.phase_peaks: dict[str, int] = {}
        self.nodes: list[Node] = []
        self.is_recording = True
        self.frees_early = False  # what a checkpointed region computed again goes once it was used
        self._parts: dict[str, int] = {}
        self._waiting: dict[int, Gradient] = {}

    def enter(self, phase: str) -> None:
        """What the rank does from here on."""
        self.phase = phase
        self._add(0, self.part)

    def _add(self, size: int, part: str) -> None:
        self.live += size
        self._parts[part] = self._parts.get(part, 0) + size
        if size >= 0:
            if self.live > self.peak:
                self.peak, self.peak_phase = self.live, self.phase
                self.peak_parts = dict(self._parts)
            if self.live > self.phase_peaks.get(self.phase, 0):
                self.phase_peaks[self.phase] = self.live

    def block(self, elements: float, width: int, part: str | None = None) -> Block:
        """Allocate."""
        return Block(self, elements, width, part or self.part)

    def make(
        self,
        elements: float,
        width: int,
        inputs: Sequence[Value] = (),
        rule: Rule | None = None,
        keeps: Sequence[Block | None] = (),
        keeps_itself: bool = False,
    ) -> Value:
        """The output of an operation, in a block of its own."""
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
        """The output of an operation, in a block that is there already (a view)."""
        source = None
        if self.is_recording and rule and any(value.source is not None for value in inputs):
            for value in inputs:
                if isinstance(value.source, Parameter):
                    value.source.uses += 1
            widths = [value.width for value in inputs]
            source = Node([value.source for value in inputs], widths, keeps, rule)
            self.nodes.append(source)
        return Value(block, elements, width, source)

    def backward(self, root: Value, gradient: Gradient, since: int = 0) -> None:
        """Run the nodes made since, last first; what reaches an earlier source waits there for it."""
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
                results[place] = self._as_expected(results[place], width)
            del handed  # the gradient that came in lives until those that go out have their types
            for place, source in enumerate(node.sources):
                result, results[place] = results[place], None
                if source is None or result is None:
                    continue
                if isinstance(source, Parameter):
                    self._accumulate(source, result)
                else:
                    # Two gradients of one tensor are added up in place, so the first one stays.
                    waiting.setdefault(id(source), result)
                del result
            node.keeps, node.rule = (), _spent

    def _as_expected(self, gradient: Gradient, width: int) -> Gradient:
        """In its input's type: a copy, where the rule made another."""
        if isinstance(gradient, Block) and gradient.width != width:
            return self.block(gradient.elements, width, gradient.part)
        return gradient

    def _accumulate(self, parameter: Parameter, gradient: Block) -> None:
        """Keep a parameter's first gradient; add later ones to it in place."""
        parameter.uses -= 1
        if parameter.waiting is None:
            parameter.waiting = gradient
        if parameter.uses > 0:
            return
        arrived, parameter.waiting = parameter.waiting, None
        if parameter.gradient is None:
            self._parts[arrived.part] -= arrived.size
            arrived.part = "gradients"
            self._parts["gradients"] = self._parts.get("gradients", 0) + arrived.size
            parameter.gradient = arrived


def _spent(gradient: list[Gradient]) -> Sequence[Gradient]:
    raise AssertionError("a node's backward runs once")
