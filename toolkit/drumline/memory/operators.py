"""The operations of transformer models on a ledger: what each allocates, saves for backward and frees.

Sizes follow torch's derivative formulas (tools/autograd/derivatives.yaml), CUDA's autocast lists
(aten/src/ATen/autocast_mode.h) and its kernels. Shapes: T tokens, h features. A width is bytes per element.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from drumline.architectures.shapes import ACTIVATIONS
from drumline.memory.ledger import (
    AdapterWeights,
    Block,
    Gradient,
    Ledger,
    Node,
    Parameter,
    Rule,
    Value,
)
from drumline.memory.load import WIDENED_AT_ONCE

FP32 = 4
INDEX = 8


class Operators:
    """Operations on one ledger; `low` is the width of autocast's dtype (2), or None without autocast.

    `keeps_copies`: whether autocast's copies of weights are kept for the backward. ZeRO-3 replaces the
    function of nn.Linear by one that saves the weight itself and casts it again.
    """

    def __init__(self, ledger: Ledger, low: int | None, keeps_copies: bool = True) -> None:
        self.ledger, self.low, self._keeps_copies = ledger, low, keeps_copies
        self._copies: dict[int, Value] = {}
        self._shared: dict[int, Node] = {}
        self.attention_weights: Value | None = None
        self._saving: list[Block] | None = None
        self._saved: list[Block] = []

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """An autocast region; its 16-bit weight copies live until it ends, or longer if saved."""
        yield
        self._copies.clear()

    def product(
        self, elements: float, width: int, inputs: Sequence[Value], rule: Rule,
        keeps: Sequence[Block | None] = (), keeps_itself: bool = False,
    ) -> Value:  # fmt: skip
        """The output of a matrix product or of attention, which selective checkpointing saves."""
        block = self.saved_block(elements, width)
        return self.ledger.wrap(
            block, elements, width, inputs, rule, (*keeps, block) if keeps_itself else keeps
        )

    def saved_block(self, elements: float, width: int) -> Block:
        """A new block that selective checkpointing saves, or, while recomputing, the saved one."""
        if self._saved:
            return self._saved.pop()
        block = self.ledger.block(elements, width)
        if self._saving is not None:
            self._saving.append(block)
        return block

    def weight(self, parameter: Parameter) -> Value:
        """A parameter as a matrix product sees it: under autocast a copy, made once per region."""
        plain = Value(None, parameter.elements, parameter.width, parameter.source)
        if self.low is None or parameter.width == self.low:
            return plain
        if not self._keeps_copies:
            return self.cast(plain, self.low)
        if id(parameter) not in self._copies:
            copy = self.cast(plain, self.low)
            if copy.source is not None and id(parameter) in self._shared:
                self.ledger.nodes.remove(copy.source)
                parameter.uses -= 1
                copy.source = self._shared[id(parameter)]
            self._copies[id(parameter)] = copy
        return self._copies[id(parameter)]

    @property
    def copies(self) -> int:
        """Bytes of the weight copies that this autocast region has made so far."""
        return sum(copy.block.size for copy in self._copies.values() if copy.block)

    def hold(self, block: Block) -> None:
        """Keep a block alive until the autocast region ends."""
        self._copies[id(block)] = Value(block, block.elements, block.width, None)

    def share(self, parameter: Parameter) -> None:
        """Let checkpointed regions share one cast of a weight; gradients are summed in the cast's dtype."""
        self._shared.pop(id(parameter), None)
        copy = self.weight(parameter)
        if copy.source is not parameter:
            self._shared[id(parameter)] = copy.source

    def cast(self, value: Value, width: int) -> Value:
        """Cast to another dtype: allocates a copy of T·h·width bytes, or nothing if the dtype is the same."""
        if value.width == width:
            return value
        ledger, elements, before = self.ledger, value.elements, value.width
        return ledger.make(elements, width, [value], lambda g: [ledger.block(elements, before)])

    def linear(
        self, value: Value, weight: Parameter, outputs: float, is_wide: bool = False
    ) -> Value:
        """X [T, in] · W [in, outputs], with W's adapter if it has one.

        Saves W if X needs a gradient and X if W does; backward allocates those that are needed. `is_wide`:
        both are cast to fp32, where autocast does not cast them back.
        """
        out = self._product(value, weight, outputs, is_wide)
        return self._adapted(value, out, weight.adapter, weight) if weight.adapter else out

    def _product(self, value: Value, weight: Parameter, outputs: float, is_wide: bool) -> Value:
        if weight.is_packed:
            return self._widened_product(value, weight, outputs)
        matrix = self.weight(weight)
        if is_wide and self.low is None:
            matrix, value = self.cast(matrix, FP32), self.cast(value, FP32)
        value = self.cast(value, self.low or value.width)
        ledger, width = self.ledger, matrix.width
        elements, weights = value.elements, matrix.elements
        rows = elements / (weights / outputs)
        for_weight, for_input = not weight.is_frozen, value.source is not None

        is_cast_again = matrix.block is not None and not self._keeps_copies

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            again = ledger.block(weights, width) if is_cast_again else None
            results = [
                ledger.block(weights, width) if for_weight else None,
                ledger.block(elements, width) if for_input else None,
            ]
            del again
            return results

        kept = matrix.block if for_input and not is_cast_again else None
        keeps = (kept, value.block if for_weight else None)
        return self.product(rows * outputs, width, [matrix, value], rule, keeps)

    def _widened_product(self, value: Value, weight: Parameter, outputs: float) -> Value:
        """X · W of a quantised W, which forward and backward widen to X's dtype, and do not keep."""
        value = self.cast(value, self.low or value.width)
        ledger, width, elements, weights = self.ledger, value.width, value.elements, weight.elements

        def widen() -> Block:
            whole = ledger.block(weights, width)
            some = min(weights, WIDENED_AT_ONCE)
            held = [
                ledger.block(some, FP32),
                ledger.block(some, FP32),
                ledger.block(some / 2, FP32),
            ]
            held.clear()
            return whole

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            wide = widen()
            result = ledger.block(elements, width)
            del wide
            return [result]

        wide = widen()
        out = self.product(elements / (weights / outputs) * outputs, width, [value], rule)
        del wide
        return out

    def _adapted(
        self, value: Value, out: Value, adapter: AdapterWeights, weight: Parameter
    ) -> Value:
        """W·x + scale·B·A·x, as peft computes it: x is cast to A's dtype before autocast casts it back."""
        outputs = adapter.second.elements / adapter.rank
        value = self.dropout(self.cast(value, adapter.first.width), adapter.dropout)
        inner = self._product(value, adapter.first, adapter.rank, False)
        inner = self._product(inner, adapter.second, outputs, False)
        if adapter.magnitude is None:
            return self.cast(self.add(out, self.scale(inner)), out.width)
        return self._magnified(value, out, inner, adapter, weight)

    def _magnified(
        self, value: Value, out: Value, inner: Value, adapter: AdapterWeights, weight: Parameter
    ) -> Value:
        """DoRA: the sum is multiplied with magnitude / norm of each output's whole weights."""
        assert adapter.magnitude
        ledger, width = self.ledger, value.width
        inputs = adapter.first.elements / adapter.rank
        outputs = adapter.second.elements / adapter.rank
        eye = ledger.block(inputs * inputs, width)
        whole = [ledger.block(inputs * outputs, width) for _ in range(2)]
        del eye, whole
        wide = adapter.magnitude.width
        norms = ledger.block(outputs, wide)
        plain = Value(None, outputs, wide, adapter.magnitude.source)
        ratio = ledger.make(
            outputs, wide, [plain], lambda g: [ledger.block(outputs, wide)], (norms,)
        )
        # With dropout the base's product is computed again, on what is left of the input.
        again = self._product(value, weight, outputs, False) if adapter.dropout else out
        first = self._times_each(again, ratio)
        second = self.scale(self._times_each(inner, ratio))
        return self.cast(self.add(out, self.add(first, second)), out.width)

    def _times_each(self, value: Value, row: Value) -> Value:
        """X [T, out] × r [out]; the gradient of r is a sum over a temporary [T, out] product."""
        ledger, elements, size = self.ledger, value.elements, row.elements
        width, needs_input = max(value.width, row.width), value.source is not None

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            result = ledger.block(elements, width) if needs_input else None
            product = ledger.block(elements, width)
            del product
            return [result, ledger.block(size, width)]

        return ledger.make(elements, width, [value, row], rule, (value.block, row.block))

    def embedding(self, tokens: float, weight: Parameter, features: float) -> Value:
        """Embedding lookup; backward allocates a dense gradient of the whole table."""
        ledger, elements, width = self.ledger, weight.elements, weight.width
        table = Value(None, elements, width, weight.source)
        return ledger.make(
            tokens * features, width, [table], lambda g: [ledger.block(elements, width)]
        )

    def add(self, one: Value, other: Value) -> Value:
        """A sum: saves nothing; both inputs get its gradient, cast to their dtype if it differs."""
        width = max(one.width, other.width)
        return self.ledger.make(one.elements, width, [one, other], lambda g: g * 2)

    def multiply(self, one: Value, other: Value) -> Value:
        """An elementwise product: saves both inputs; backward allocates both gradients."""
        width, elements = max(one.width, other.width), one.elements
        ledger = self.ledger

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            return [ledger.block(elements, width), ledger.block(elements, width)]

        return ledger.make(elements, width, [one, other], rule, (one.block, other.block))

    def add_broadcast(self, value: Value, row: Value) -> Value:
        """Add a smaller, broadcast tensor; its gradient is summed to the smaller size."""
        ledger, width, size = self.ledger, max(value.width, row.width), row.elements

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            return [gradient[0], ledger.block(size, width)]

        return ledger.make(value.elements, width, [value, row], rule)

    def scale(self, value: Value) -> Value:
        """Multiply by a number: saves nothing."""
        return self.pointwise(value, keeps_input=False)

    def shift(self, value: Value) -> Value:
        """Add a number: saves nothing and passes its gradient on without a copy."""
        return self.ledger.make(value.elements, value.width, [value], lambda g: g)

    def scale_by_constant(self, value: Value, width: int) -> Value:
        """Multiply by a small tensor of this width that needs no gradient (rotary cosines)."""
        ledger, elements, wide = self.ledger, value.elements, max(width, value.width)
        return ledger.make(elements, wide, [value], lambda g: [ledger.block(elements, wide)])

    def shift_by_constant(self, value: Value, width: int) -> Value:
        """Add a small tensor of this width that needs no gradient (a mask)."""
        return self.ledger.make(value.elements, max(width, value.width), [value], lambda g: g)

    def pointwise(
        self, value: Value, keeps_input: bool = True, keeps_output: bool = False,
        width: int | None = None, scratch: int = 0,
    ) -> Value:  # fmt: skip
        """An elementwise function; backward allocates the gradient and `scratch` temporaries of its size."""
        ledger, elements, width = self.ledger, value.elements, width or value.width
        before = value.width

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            held = [ledger.block(elements, before) for _ in range(scratch)]
            result = ledger.block(elements, before)
            del held
            return [result]

        keeps = (value.block,) if keeps_input else ()
        return ledger.make(elements, width, [value], rule, keeps, keeps_output)

    def power(self, value: Value) -> Value:
        """x² or x³, in fp32 under autocast; backward allocates two temporaries (a power, its multiple)."""
        value = self.cast(value, FP32 if self.low else value.width)
        return self.pointwise(value, scratch=2)

    def activate(self, name: str, value: Value) -> Value:
        """The activation function of this name in ACTIVATIONS."""
        saved = ACTIVATIONS[name]
        if saved == "terms":
            return self._gelu_new(value)
        return self.pointwise(value, keeps_input=saved == "input", keeps_output=saved == "output")

    def _gelu_new(self, value: Value) -> Value:
        """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), unfused: one operation per term."""
        half = self.scale(value)
        inner = self.scale(self.add(value, self.scale(self.power(value))))
        bent = self.pointwise(inner, keeps_input=False, keeps_output=True)
        del inner
        one = self.shift(bent)
        del bent
        return self.multiply(half, one)

    def dropout(self, value: Value, probability: float) -> Value:
        """Allocates the output and a mask of one byte per element; a no-op if the probability is 0."""
        if not probability:
            return value
        mask = self.ledger.block(value.elements, 1)
        ledger, elements, width = self.ledger, value.elements, value.width
        return ledger.make(
            elements, width, [value], lambda g: [ledger.block(elements, width)], (mask,)
        )

    def rotate(self, value: Value, width: int) -> Value:
        """Rotary positions: x·cos + rotate_half(x)·sin; `width` is that of cos and sin."""
        turned = self.scale_by_constant(value, width)
        return self.add(turned, self.scale_by_constant(self.rotate_half(value), width))

    def rotate_part(self, value: Value, width: int, share: float) -> Value:
        """Rotary positions of a `share` of each head's features, which are then joined with the others.

        Slices of a head are views; the gradient of each is padded with zeros to the whole size.
        """
        ledger, elements, before = self.ledger, value.elements, value.width
        part = elements * share

        def view(size: float) -> Value:
            return ledger.wrap(
                value.block, size, before, [value], lambda g: [ledger.block(elements, before)]
            )

        turned = self.rotate(view(part), width)
        rest = self.cast(view(elements - part), turned.width)

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            return [gradient[0].view(part), gradient[0].view(elements - part)]

        return ledger.make(elements, turned.width, [turned, rest], rule)

    def parts(self, packed: Value, sizes: Sequence[float], is_chunked: bool) -> list[Value]:
        """Views of parts of a packed tensor.

        Chunks: the gradients of all parts are joined in a new block. Slices: each is padded with zeros to the
        whole size.
        """
        ledger, elements, width = self.ledger, packed.elements, packed.width
        if not is_chunked:
            return [
                ledger.wrap(
                    packed.block, size, width, [packed], lambda g: [ledger.block(elements, width)]
                )
                for size in sizes
            ]
        waiting: list[Gradient] = []

        def join(gradient: list[Gradient]) -> list[Gradient]:
            whole = ledger.block(elements, width)
            waiting.clear()
            return [whole]

        def hand_over(gradient: list[Gradient]) -> list[Gradient]:
            waiting.append(gradient.pop())
            return [ledger.block(0, width)]

        whole = ledger.wrap(packed.block, elements, width, [packed], join)
        return [ledger.wrap(packed.block, size, width, [whole], hand_over) for size in sizes]

    def rotate_half(self, value: Value) -> Value:
        """The second half of a head's features, negated, before the first one: -x₂ and x are copied."""
        ledger, elements, before = self.ledger, value.elements, value.width

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            half = ledger.block(elements / 2, before)
            first = ledger.block(elements, before)
            del half
            second = ledger.block(elements, before)
            del second
            return [first]

        half = ledger.block(elements / 2, before)
        result = ledger.make(elements, before, [value], rule)
        del half
        return result

    def attention(self, q: Value, k: Value, v: Value, sums: float, mask: float,
                  packed: Value | None) -> Value:  # fmt: skip
        """softmax(q·kᵀ)·v by a fused kernel (flash or memory-efficient).

        Saves q, k, v, the output, `sums` fp32 log-sum-exps (one per head and token) and a copy of the mask in
        q's dtype (`mask` elements, 0 without one). `packed`: the tensor that q, k and v are views of, if any.
        """
        q, k, v = (self.cast(value, self.low or value.width) for value in (q, k, v))
        ledger, width, shares_heads = self.ledger, q.width, k.elements != q.elements
        sizes = (q.elements, k.elements, v.elements)
        bias = ledger.block(mask, width) if mask else None
        lse = self.saved_block(sums, FP32)

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            results = [ledger.block(size, width) for size in sizes]
            held = [ledger.block(sums, FP32)]
            if width < FP32:
                held.append(ledger.block(sizes[0], FP32))
            if shares_heads:
                held += [ledger.block(sizes[0], width) for _ in range(2)]
            held.clear()
            return [tuple(results)] if packed is not None else results

        inputs = [packed] if packed is not None else [q, k, v]
        keeps = (q.block, k.block, v.block, lse, bias)
        out = sizes[0] if shares_heads else sizes[2]
        return self.product(out, width, inputs, rule, keeps, keeps_itself=True)

    def copy(self, value: Value) -> Value:
        """A copy in another order of the elements; its gradient is passed on as it is."""
        return self.ledger.make(value.elements, value.width, [value], lambda g: g)

    def repeat_heads(self, query: Value, key: Value, value: Value) -> tuple[Value, Value]:
        """Keys and values with a head for each head of the queries."""
        times = query.elements / key.elements
        return self.repeat(key, key.elements * times), self.repeat(value, value.elements * times)

    def repeat(self, value: Value, elements: float) -> Value:
        """Repeat shared key or value heads to `elements`, one per query head; the gradient is summed back."""
        ledger, before, width = self.ledger, value.elements, value.width
        if before == elements:
            return value
        return ledger.make(elements, width, [value], lambda g: [ledger.block(before, width)])

    def gather_gradients(self, value: Value) -> Value:
        """A view such as split or chunk; the gradients of its parts are concatenated into a new block."""
        ledger, elements, width = self.ledger, value.elements, value.width
        return ledger.wrap(
            value.block, elements, width, [value], lambda g: [ledger.block(elements, width)]
        )

    def checkpoint(
        self,
        value: Value,
        run: Callable[[Value], Value],
        is_selective: bool = False,
        offloads: bool = False,
        is_trained: bool = False,
    ) -> Value:
        """Activation checkpointing: saves only the input; backward recomputes `run` first.

        `is_selective`: the outputs of matrix products and attention are saved, too, and not recomputed.
        `offloads`: the input is saved in host memory. `is_trained`: `run` uses weights that need gradients,
        so that it has a backward even if its input needs none.
        """
        ledger = self.ledger
        recording, ledger.is_recording = ledger.is_recording, False
        saved: list[Block] = []
        self._saving = saved if is_selective and recording else None
        out = run(value)
        self._saving = None
        ledger.is_recording = recording
        elements, width, source = value.elements, value.width, value.source
        kept = None if offloads else value.block

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            since = len(ledger.nodes)
            block = ledger.block(elements, width) if offloads else kept
            self._saved, saved[:] = [*reversed(saved)], []
            with self.autocast():
                root = run(Value(block, elements, width, source))
            root.block = None
            ledger.frees_early = True
            ledger.backward(root, gradient.pop(), since)
            ledger.frees_early = False
            return [None, None]  # the inner backward already gave the gradients to their sources

        inside = Value(None, 0, width, Parameter(0, width) if is_trained else None)
        return ledger.wrap(out.block, out.elements, out.width, [value, inside], rule, (kept,))


def token_loss(run: Operators, logits: Value, tokens: float, has_z_loss: bool = False) -> Value:
    """Cross-entropy of [T, V] logits in fp32: 12·V·T bytes in its backward, 16 with `has_z_loss`.

    These are the saved log-softmax, its gradient and the gradient of the logits, 4 bytes each; a z-loss has a
    gradient of the logits that is added to theirs.
    """
    ledger, elements = run.ledger, logits.elements
    with part(ledger, "loss"):
        wide = run.cast(logits, FP32)
        inputs = [run.pointwise(wide, keeps_input=False, keeps_output=True)]
        inputs += [wide] * has_z_loss
        number = len(inputs)
        return ledger.make(
            tokens,
            FP32,
            inputs,
            lambda g: [ledger.block(elements, FP32, "loss") for _ in range(number)],
        )


@contextmanager
def part(ledger: Ledger, name: str) -> Iterator[None]:
    """Count allocations in this context under part `name` of the plan's memory breakdown."""
    before, ledger.part = ledger.part, name
    yield
    ledger.part = before
