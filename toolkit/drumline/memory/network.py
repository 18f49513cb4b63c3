"""The forward of a whole model on a ledger: embedding, layers, head and loss.

Layers of a kind are alike, so for the peak of live bytes only the first layer, one of each kind and the last
one are simulated (the last two under FSDP2, where a layer's buffers live until the next layer). One block
stands for what the layers between them save. Memory grows or shrinks evenly over those layers, so the peak is
at either end.
For the allocator model, which depends on the order of all allocations, every layer is simulated.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace

from drumline.architectures.shapes import Tensors, count, layer_tensors, outer_tensors
from drumline.architectures.trained import adapter_tensors, packed_names, trained_parameters
from drumline.memory.families import Layer, Rows, norm
from drumline.memory.heads import class_loss, transformed
from drumline.memory.ledger import Block, Gradient, Ledger, Parameter, Value
from drumline.memory.load import LayerKind, Load
from drumline.memory.norms import layer_norm, rms_norm
from drumline.memory.operators import FP32, INDEX, Operators, part, token_loss
from drumline.memory.sharding import Group, Stage
from drumline.memory.t5 import Sources, position_biases

PLAYED_CHUNKS = 3
_EMBEDDINGS = ("embedding", "positions", "types", "patch", "class", "mask")


class Network:
    """A model's weights as its forward sees them; under FSDP2 with the groups that are gathered together."""

    def __init__(self, ledger: Ledger, load: Load, is_whole: bool = False) -> None:
        """`is_whole`: simulate every layer."""
        self.ledger, self.load, self.shape, self.is_whole = ledger, load, load.shape, is_whole
        are_linear = load.shape.family != "gpt2"  # GPT-2's Conv1D is not an nn.Linear
        self.run = Operators(ledger, load.low, not (load.strategy == "zero3" and are_linear))
        width, shape = load.forward_width, load.shape
        trained = shape.trained
        frozen = trained.outer if trained else frozenset()
        narrow = load.frozen_width
        self.outer = {
            name: Parameter(math.prod(sizes), narrow if name in frozen else width, name in frozen)
            for name, sizes in outer_tensors(shape).items()
        }
        self.head = self.outer.get("head") or self.outer["embedding"]
        self._first, self._last = _played(load, is_whole)
        self.kinds = self._first + self._last
        lora = trained.lora if trained else None
        self.layers = [
            Layer(
                shape.layer_shapes[kind.segment][0],
                width,
                narrow,
                kind.frozen,
                lora,
                packed_names(shape, shape.layer_shapes[kind.segment][0]),
            )
            for kind in self.kinds
        ]
        played = sum(w.elements for layer in self.layers for w in _trained(layer))
        outside = count({n: s for n, s in outer_tensors(shape).items() if n not in frozen})
        self.unplayed = Parameter(trained_parameters(shape) - outside - played, width)
        self.stage = Stage()
        self.root: Group | None = None
        self.embedded: Group | None = None
        self.groups: list[Group] = []
        self._shared: list[Block] = []  # by all layers, until their backward
        # Of the layers that are not simulated: weights that FSDP2 keeps gathered, gradients not reduced yet.
        self._unplayed_weights: list[Block] = []
        self._unreduced: list[Block] = []
        self._outputs: list[Block] = []  # of layers; DeBERTa's forward keeps them until its end
        if load.strategy == "fsdp":
            outer = outer_tensors(shape)
            first = {name: outer.pop(name) for name in list(outer) if self._is_embedded(name)}
            self.embedded = (
                self._group(first, [self.outer[name] for name in first], frozen) if first else None
            )
            self.root = self._group(outer, [self.outer[name] for name in outer], frozen)
            self.groups = [self._group_of(layer) for layer in self.layers]

    def _is_embedded(self, name: str) -> bool:
        """Whether FSDP2 gathers this weight in a group of its own, with the other embeddings."""
        return self.shape.has_embedding_block and name in _EMBEDDINGS

    def _group(
        self,
        tensors: Tensors,
        weights: list[Parameter],
        frozen: Collection[str],
        packed: Collection[str] = (),
    ) -> Group:
        return Group(self.ledger, self.load, self.stage, tensors, weights, frozen, packed)

    def _group_of(self, layer: Layer) -> Group:
        own = layer_tensors(layer.shape)
        tensors = own | adapter_tensors(self.shape, own)
        packed = packed_names(self.shape, layer.shape)
        return self._group(tensors, layer.all_weights(), layer.frozen, packed)

    def parameters(self) -> list[Parameter]:
        """All parameters; those of the layers that are not simulated are one Parameter."""
        layers = [p for layer in self.layers for p in layer.all_weights()]
        return [*self.outer.values(), *layers, self.unplayed]

    def begin(self) -> None:
        """What FSDP2 holds before the last micro-batch: gathered weights, unsharded gradients."""
        groups = self._all_groups()
        ranks = self.load.shard_ranks
        unplayed = self._unplayed(lambda group: group.trained) if groups else 0.0
        if self.load.begins_gathered:
            for group in groups:
                group.open()
            self.stage.gathered = None
            self._hold_unplayed_weights()
        if groups and self.load.accumulates_whole:
            for group in groups:
                group.accumulate_whole()
            width = self.load.reduced_width
            self._unreduced = [self.ledger.block(unplayed * ranks, width, "gradients")]

    def forward(self, rows: Rows) -> Value:
        """Run the forward of a micro-batch and return its loss."""
        if self.root:
            self.root.open()
        loss = self._loss(rows)
        self.stage.gathered = None
        if not self.ledger.is_recording:
            self._close()
        if not self.ledger.is_recording:
            self._shared.clear()
        if self.root and self.ledger.is_recording:
            loss = self.root.before_backward(loss, self.groups[-1])
        return loss

    def backward(self, loss: Value) -> None:
        """Run the backward; under FSDP2 the gradients of weights outside the layers are reduced last."""
        loss.block = None
        self.ledger.backward(loss, self.ledger.block(1, FP32))
        self._shared.clear()
        if self.root:
            self.root.reduce()
            if self.embedded:
                self.embedded.reduce()
            self.stage.reduced = None
            self.stage.all_reduced.clear()
            self._close()

    def _close(self) -> None:
        """Free the gathered weights that are held still."""
        for group in self._all_groups():
            group.close()
        self._unplayed_weights.clear()

    def _all_groups(self) -> list[Group]:
        """FSDP2's groups of weights; none without it."""
        return [group for group in (self.root, self.embedded, *self.groups) if group]

    def forget_gradients(self) -> None:
        """Free all gradients, as `zero_grad` does."""
        for parameter in self.parameters():
            parameter.gradient = None
        for group in self._all_groups():
            group.gradient = None

    def _loss(self, rows: Rows) -> Value:
        if self.shape.classes is not None:
            hidden = self._model(rows)
            return class_loss(self.run, self.shape, self.outer, hidden, rows.samples)
        if self.load.chunked_loss:
            return self._chunked_loss(rows, self._model(rows))
        return token_loss(
            self.run, self._logits(self._model(rows)), rows.tokens, self.load.has_z_loss
        )

    def _model(self, rows: Rows) -> Value:
        """From tokens to the head's input; `embedded` stays alive until the end, as in transformers."""
        if self.embedded:
            self.embedded.open()
        embedded = self._embed(rows)
        mask = self.ledger.block(*self._mask(rows, embedded.width))
        self._shared = [self.ledger.block(self._rotary_elements(rows), embedded.width)]
        if self.load.checkpointing != "none":  # else layers save a copy of their own
            self._shared.append(mask)
        if self.embedded:
            self.embedded.close_after_forward()
            embedded = self.embedded.before_backward(embedded, None)
        stream = self._norm(self._all_layers(self._with_shared(rows), embedded))
        if self.shape.family == "t5":
            stream = self.run.dropout(stream, self.shape.dropout)
        self._outputs.clear()
        del mask
        return stream

    def _rotary_elements(self, rows: Rows) -> float:
        """Elements of the cosines and sines, which live until the backward; windows have their own."""
        shape = self.shape
        if shape.family != "decoder" or shape.structure.rotary == "none":
            return 0
        kinds = len(set(shape.windowed)) if shape.structure.has_local_rotary else 1
        return 2 * kinds * rows.length * shape.head_dim * shape.rotary_share

    def _mask(self, rows: Rows, width: int) -> tuple[int, int]:
        """(elements, bytes per element) of the mask that all layers share: float for eager, else bool.

        DeBERTa's is of integers, and so are the distances of tokens.
        """
        if self.shape.family == "deberta":
            return (rows.samples + 1) * rows.length * rows.length, INDEX
        is_eager = rows.kernel == "eager"
        is_masked = any(kind.is_masked for kind in self.load.layer_kinds)
        square = rows.length * rows.length * (rows.samples if is_masked else 1)
        if rows.is_masked:  # layers with a window have a mask of their own
            square *= len(set(self.shape.windowed)) or 1
        return (square if is_eager or is_masked else 0), (width if is_eager else 1)

    def _with_shared(self, rows: Rows) -> Rows:
        """The rows with what all layers of DeBERTa and of T5's encoder share."""
        if self.shape.family == "t5":
            return replace(rows, sources=Sources(self._position_biases(rows, 0)))
        return replace(rows, distances=self._distances())

    def _distances(self) -> Value | None:
        """DeBERTa's table of relative positions, normalised if its config says so."""
        relative = self.shape.relative
        if not relative:
            return None
        weight = self.outer["distances"]
        table = Value(None, weight.elements, weight.width, weight.source)
        return layer_norm(self.run, table, self.shape.hidden) if relative.is_normed else table

    def _embed(self, rows: Rows) -> Value:
        shape, run = self.shape, self.run
        if shape.patches:
            return self._embed_patches(rows)
        hidden = run.embedding(rows.tokens, self.outer["embedding"], shape.hidden)
        if shape.types:
            types = run.embedding(rows.tokens, self.outer["types"], shape.hidden)
            hidden = run.add(hidden, types)
            del types
        if shape.positions:
            places = run.embedding(rows.length, self.outer["positions"], shape.hidden)
            hidden = run.add_broadcast(hidden, places)
        if shape.family in ("bert", "deberta"):
            hidden = layer_norm(run, hidden, shape.hidden)
        if shape.family == "deberta":
            hidden = run.scale_by_constant(hidden, hidden.width)  # padded tokens are set to 0
        if shape.structure.has_embedding_norm:
            hidden = norm(self.layers[-1], run, hidden)
        if shape.structure.embedding_scale == "tensor":
            hidden = run.scale_by_constant(hidden, hidden.width)
        elif shape.structure.embedding_scale == "number":
            hidden = run.scale(hidden)
        return run.dropout(hidden, shape.dropout)

    def _embed_patches(self, rows: Rows) -> Value:
        """Embed patches by a convolution, prepend the class token, add positions."""
        shape, run, ledger = self.shape, self.run, self.ledger
        pixels = rows.samples * shape.patches * shape.patch_inputs
        image = Value(None, pixels, FP32, None)  # allocated with the micro-batch's inputs
        patches = run.linear(image, self.outer["patch"], shape.hidden)
        elements, before = rows.tokens * shape.hidden, patches.elements
        width = max(patches.width, self.load.forward_width)
        narrow = patches.width
        if not shape.has_class_token:
            places = run.embedding(shape.patches, self.outer["positions"], shape.hidden)
            return run.add_broadcast(patches, places)
        with_class = ledger.make(
            elements, width, [patches], lambda g: [ledger.block(before, narrow)]
        )
        table = self.outer["positions"]
        places = Value(None, table.elements, width, table.source)
        del patches
        return run.dropout(run.add_broadcast(with_class, places), shape.dropout)

    def _norm(self, stream: Value) -> Value:
        if self.shape.family in ("bert", "deberta"):
            return stream
        if self.shape.family == "t5":
            weight = self.layers[-1].rest
            return rms_norm(self.run, stream, self.shape.hidden, weight, multiplies_input=True)
        if self.shape.family == "decoder":
            return norm(self.layers[-1], self.run, stream)
        return layer_norm(self.run, stream, self.shape.hidden)

    def _all_layers(self, rows: Rows, stream: Value) -> Value:
        are_all = self.ledger.is_recording or self.is_whole
        kinds = self.kinds if are_all else self._first
        unplayed = Counter(self.load.layer_kinds)
        unplayed.subtract(kinds)
        grown = copied = 0
        for number, kind in enumerate(kinds):
            if self._begins_decoder(rows, number):
                rows, stream = self._decoder_inputs(rows, number, stream)
            before, copies = self.ledger.live, self.run.copies
            gathered = self.groups[number].whole_bytes if self.groups else 0
            stream = self._layer(rows, number, stream)
            before += self.groups[number].whole_bytes - gathered if self.groups else 0
            held = self._hold_output(stream)
            if number:  # the first layer has allocations of its own
                grown += unplayed[kind] * (self.ledger.live - before - held)
                if unplayed[kind]:
                    self._outputs.append(self.ledger.block(unplayed[kind] * held, 1))
                copied += unplayed[kind] * (self.run.copies - copies)
                unplayed[kind] = 0
            if number + 1 == len(self._first) and self.shape.layers > len(kinds):
                stream = self._lump(stream, grown, copied)
        return stream

    def _begins_decoder(self, rows: Rows, number: int) -> bool:
        """Whether a layer is the first of T5's decoder."""
        is_there = rows.sources is None or rows.sources.encoded is not None
        return self.layers[number].shape.crosses and not is_there

    def _decoder_inputs(self, rows: Rows, number: int, stream: Value) -> tuple[Rows, Value]:
        """T5's encoded tokens and what its decoder begins with: the same number of embedded tokens."""
        run, shape, ledger = self.run, self.shape, self.ledger
        encoded = run.dropout(self._norm(stream), shape.dropout)
        stream = self._embed(rows)
        width, elements = run.low or stream.width, shape.heads * rows.length * rows.length
        mask = ledger.block(rows.samples * rows.length * rows.length, 1)
        (self._outputs if self.load.checkpointing == "none" else self._shared).append(mask)
        # With checkpointing transformers has them get a gradient, so that what depends on them is recomputed.
        leaf = None if self.load.checkpointing == "none" else Parameter(elements, width)
        zeros = Value(ledger.block(elements, width), elements, width, leaf)
        sources = Sources(self._position_biases(rows, number), encoded, zeros)
        return replace(rows, sources=sources), stream

    def _position_biases(self, rows: Rows, number: int) -> Value:
        table = self.layers[number].weights["distances"]
        return position_biases(self.run, table, self.shape.heads, rows.length)

    def _hold_output(self, stream: Value) -> int:
        """Keep a layer's output in DeBERTa's list of them; the bytes that nothing else keeps."""
        if self.shape.family != "deberta" or not stream.block:
            return 0
        self._outputs.append(stream.block)
        is_saved = not self.run.low or self.load.checkpointing != "none"
        return 0 if is_saved else stream.block.size

    def _layer(self, rows: Rows, number: int, stream: Value) -> Value:
        layer, kind = self.layers[number], self.kinds[number]
        rows = replace(
            rows,
            kernel=self.load.kernel(kind.is_masked),
            is_masked=kind.is_masked,
            is_rotated=kind.is_rotated,
        )

        def forward(value: Value) -> Value:
            value = self._touch(value, layer.rest)
            return layer.forward(self.run, rows, value, self.shape.dropout)

        group = self.groups[number] if self.groups else None
        if group:
            group.open()
            stream = group.after_backward(stream)
        if self.load.checkpointing != "none" and self.ledger.is_recording:
            is_selective = self.load.checkpointing == "selective"
            stream = self.run.checkpoint(
                stream,
                forward,
                is_selective,
                offloads=self.load.offloads_inputs,
                is_trained=layer.is_trained,
            )
        else:
            stream = forward(stream)
        if group:
            group.close_after_forward()
            ahead = self.groups[number - 1] if number else self.embedded
            stream = group.before_backward(stream, ahead)
        return stream

    def _touch(self, value: Value, rest: Parameter) -> Value:
        """A no-op whose backward allocates the gradients of the layer's norms and biases."""
        if rest.is_frozen:
            return value
        ledger, elements, width = self.ledger, rest.elements, rest.width
        weights = Value(None, elements, width, rest)
        return ledger.wrap(value.block, value.elements, value.width, [value, weights],
                           lambda g: [g.pop(), ledger.block(elements, width)])  # fmt: skip

    def _unplayed(self, elements: Callable[[Group], float]) -> float:
        """The sum of this number of elements of a group, over the layers that are not simulated."""
        kinds = Counter(self.load.layer_kinds)
        kinds.subtract(self.kinds)
        each = {kind: elements(group) for kind, group in zip(self.kinds, self.groups, strict=True)}
        return float(sum(each[kind] * number for kind, number in kinds.items()))

    def _hold_unplayed_weights(self) -> None:
        """Hold the gathered weights of the layers that are not simulated, once."""
        if not self._unplayed_weights:
            size = self._unplayed(lambda group: group.shard) * self.load.shard_ranks
            block = self.ledger.block(size, self.load.forward_width, "communication")
            self._unplayed_weights.append(block)

    def _lump(self, stream: Value, grown: int, copied: int) -> Value:
        """Stands for the layers that are not simulated: what they save, and their weights' gradients.

        `grown` and `copied` are bytes of all of them: live bytes added, and of these autocast's copies.
        Copies that no backward saves are freed when the autocast region ends.
        """
        ledger, load = self.ledger, self.load
        is_freed = load.checkpointing != "none" or not ledger.is_recording
        transient = copied if is_freed else 0
        if transient:
            self.run.hold(ledger.block(transient, 1))
        if self.groups and load.keeps_weights:
            self._hold_unplayed_weights()
        if not ledger.is_recording:
            return stream
        kept = [ledger.block(grown - transient, 1)]
        elements = (
            self._unplayed(lambda group: group.trained) if self.groups else self.unplayed.elements
        )
        born = 0.0 if load.keeps_gradients else elements
        width = load.forward_width if not self.groups else load.state_width

        waits = bool(self.groups) and load.keeps_gradients and load.shard_ranks < load.ranks

        def rule(gradient: list[Gradient]) -> list[Gradient]:
            kept.clear()
            self._unreduced.clear()
            if not load.stays_gathered:
                self._unplayed_weights.clear()
            if waits:
                self.groups[0].hold_all_reduced(elements)
            return [gradient.pop(), ledger.block(born, width, "gradients")]

        weights = Value(None, self.unplayed.elements, width, self.unplayed)
        return ledger.wrap(stream.block, stream.elements, stream.width, [stream, weights], rule)

    def _logits(self, hidden: Value) -> Value:
        run = self.run
        if self.shape.pooling == "vocabulary":
            hidden = transformed(run, self.shape, self.outer, hidden)
        with part(self.ledger, "loss"):
            logits = run.linear(hidden, self.head, self.shape.vocabulary)
            for operation in self.shape.structure.logit_operations:
                if operation == "tanh":
                    logits = run.pointwise(logits, keeps_input=False, keeps_output=True)
                else:
                    logits = run.scale(logits)
            return logits

    def _chunked_loss(self, rows: Rows, hidden: Value) -> Value:
        """A checkpointed loss per chunk of tokens; at most PLAYED_CHUNKS of them are simulated."""
        run, ledger, shape = self.run, self.ledger, self.shape
        number = self.load.chunks
        tokens = -(-rows.length // number) * rows.samples
        total: Value | None = None
        elements, width = hidden.elements, hidden.width

        def spread(gradient: list[Gradient]) -> list[Gradient]:
            return [ledger.block(elements, width)]  # a slice's gradient is as large as the whole

        def chunk(value: Value) -> Value:
            return token_loss(run, self._logits(value), tokens, self.load.has_z_loss)

        if ledger.is_recording:
            run.share(self.head)
        for _ in range(min(number, PLAYED_CHUNKS)):
            piece = ledger.wrap(hidden.block, tokens * shape.hidden, width, [hidden], spread)
            loss = run.checkpoint(piece, chunk, is_trained=not self.head.is_frozen)
            total = loss if total is None else run.add(total, loss)
        assert total
        return total


def _trained(layer: Layer) -> list[Parameter]:
    return [weight for weight in layer.all_weights() if not weight.is_frozen]


def _played(load: Load, is_whole: bool) -> tuple[list[LayerKind], list[LayerKind]]:
    """The kinds of the layers that are simulated, before and after the block that stands for the others."""
    kinds = load.layer_kinds
    first = [kinds[0], *dict.fromkeys(kinds)]
    last = kinds[-2:] if load.strategy == "fsdp" else kinds[-1:]
    needed = Counter(first + last)
    if is_whole or any(number > kinds.count(kind) for kind, number in needed.items()):
        return kinds, []
    return first, last
