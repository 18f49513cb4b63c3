"""Which weights of a known model are trained, and the weights that an adapter adds. Pure."""

from collections.abc import Collection
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from drumline.architectures.shapes import (
    LoraShape,
    ModelShape,
    Tensors,
    Trained,
    count,
    layer_tensors,
    outer_tensors,
)
from drumline.errors import PlanError
from drumline.recipe.model_section import Adapter, Model

if TYPE_CHECKING:
    from drumline.architectures.weight_paths import Paths

NF4_BLOCK = 64
"""Weights of a row that share a scale."""
_NO_TARGETS = {"router", "distances"}
"""Matrices of a layer that are no linear layers, or that choose experts."""
_FEED_FORWARD = {"gate", "up", "down", "gate_up", "shared_gate", "shared_up", "shared_down"}
"""Those that `all-linear` leaves out of a model with experts (`train/models/adapter.py`)."""

LowRank = tuple[int, int, int]
"""Of an adapter's layer: its inputs, its rank and its outputs."""


class WeightRun(NamedTuple):
    """Weights outside the layers, or those of each of `number` equal layers in a row."""

    tensors: Tensors
    number: int
    is_layer: bool


def weights_of(shape: ModelShape, is_frozen: bool) -> list[WeightRun]:
    """All weights that are trained, those of the adapter among them, or all frozen ones."""
    trained = shape.trained
    outside = _chosen(outer_tensors(shape), trained.outer if trained else (), is_frozen)
    found = [WeightRun(outside, 1, is_layer=False)]
    for (one, frozen), run in groupby(layers_of(shape)):
        own = layer_tensors(one)
        tensors = _chosen(own, frozen, is_frozen)
        if not is_frozen:
            tensors |= adapter_tensors(shape, own)
        found.append(WeightRun(tensors, len(list(run)), is_layer=True))
    return [run for run in found if run.tensors]


def adapter_tensors(shape: ModelShape, tensors: Tensors) -> Tensors:
    """The weights that the model's adapter adds to a layer with these."""
    lora = shape.trained.lora if shape.trained else None
    found: Tensors = {}
    for name in sorted(lora.targets & tensors.keys()) if lora else ():
        assert lora
        if len(tensors[name]) != 2:  # of the experts; another layer's is a matrix
            continue
        inputs, rank, outputs = low_rank(shape, tensors[name], lora.rank)
        found |= {f"{name}_lora_a": (rank, inputs), f"{name}_lora_b": (outputs, rank)}
        if lora.is_dora:
            found[f"{name}_magnitude"] = (outputs,)
    return found


def packed_bytes(shape: ModelShape, name: str, sizes: tuple[int, ...]) -> float | None:
    """Bytes per element of a matrix of a layer that is quantised, with its scales; None of another weight."""
    kind = shape.trained.quantization if shape.trained else "none"
    is_matrix = (
        len(sizes) == 2 and name not in _NO_TARGETS and not name.endswith(("_lora_a", "_lora_b"))
    )
    if kind == "none" or not is_matrix or shape.family == "gpt2":
        return None
    if kind == "int8":
        return 1 + 4 / sizes[1]
    return 0.5 + 4 / NF4_BLOCK if sizes[1] % NF4_BLOCK == 0 else None


def packed_names(shape: ModelShape, layer: ModelShape) -> set[str]:
    """Names of the matrices of a layer that are quantised."""
    tensors = layer_tensors(layer)
    return {name for name, sizes in tensors.items() if packed_bytes(shape, name, sizes) is not None}


def low_rank(shape: ModelShape, sizes: tuple[int, ...], rank: int) -> LowRank:
    """Inputs, rank and outputs of an adapter of a matrix of this shape."""
    outputs, inputs = sizes if shape.family != "gpt2" else reversed(sizes)
    return inputs, rank, outputs


def trained_parameters(shape: ModelShape) -> int:
    """Number of parameters that are trained, those of the adapter among them."""
    if shape.trained is None:
        return shape.parameters
    return sum(count(run.tensors) * run.number for run in weights_of(shape, is_frozen=False))


def held_parameters(shape: ModelShape) -> int:
    """Number of parameters of the model with its adapter."""
    added = [count(adapter_tensors(shape, layer_tensors(one))) for one, _ in layers_of(shape)]
    return shape.parameters + sum(added)


def flops_per_sample(shape: ModelShape, sequence_length: int | None) -> int:
    """FLOPs of forward and backward for one sample: frozen matrices have no gradient of their own.

    Each costs 2 per element and token less; the adapter's cost 6.
    """
    whole = shape.flops_per_sample(sequence_length)
    if shape.trained is None:
        return whole
    tokens = shape.tokens(sequence_length)
    share = shape.active_in_layers / max(1, _matrices(shape))
    frozen = int(share * sum(
        run.number * count({name: sizes for name, sizes in run.tensors.items() if len(sizes) > 1})
        for run in weights_of(shape, is_frozen=True)
        if run.is_layer
    ))  # fmt: skip
    if shape.classes is None and "head" in shape.trained.outer:
        frozen += shape.vocabulary * shape.hidden
    added = held_parameters(shape) - shape.parameters
    return whole - 2 * tokens * frozen + 6 * tokens * added


def _matrices(shape: ModelShape) -> int:
    """Elements of the layers' matrices, those of all experts among them."""
    return sum(
        count({name: sizes for name, sizes in layer_tensors(one).items() if len(sizes) > 1})
        for one, _ in layers_of(shape)
    )


def layers_of(shape: ModelShape) -> list[tuple[ModelShape, frozenset[str]]]:
    """Every layer's shape, and the names of its frozen weights."""
    shapes = [one for one, number in shape.layer_shapes for _ in range(number)]
    none: frozenset[str] = frozenset()
    frozen = shape.trained.layers if shape.trained else (none,) * len(shapes)
    return list(zip(shapes, frozen, strict=True))


def with_trained(shape: ModelShape, model: Model) -> ModelShape | str:
    """The shape with what the recipe's `adapter` and `frozen` say is trained, or why that is not known.

    PlanError where a name of the recipe matches nothing.
    """
    if model.adapter is None and not model.frozen:
        return shape
    if shape.family == "t5" and model.activation_checkpointing != "none":
        return "no closed form for a T5 of which a part is frozen, with checkpointed layers"
    from drumline.architectures.weight_paths import paths_of

    paths = paths_of(shape)
    named = model.frozen or (
        model.adapter and (model.adapter.train_also or model.adapter.targets != "all-linear")
    )
    if named and paths is None:
        return f"which weights of {shape.architecture} the recipe names is known once it is built"
    if model.adapter:
        trained = _of_adapter(shape, model.adapter, paths)
        if isinstance(trained, str):
            return trained
        return replace(shape, trained=replace(trained, quantization=model.quantization))
    assert paths
    chosen = _matching(shape, paths, model.frozen, "model.frozen")
    if chosen is None:
        return f"not every weight of {shape.architecture} is known by name before it is built"
    return replace(shape, trained=_named(shape, paths, chosen))


def _matching(shape: ModelShape, paths: "Paths", patterns: list[str], key: str) -> set[str] | None:
    """The parameters that the patterns match; None where one matches none of those that are known by name.

    PlanError in its place if all parameters are.
    """
    from drumline.architectures.patterns import matching

    names = paths.all_names(shape)
    is_complete = len(names) == len(outer_tensors(shape)) + sum(
        len(layer_tensors(one)) for one, _ in layers_of(shape)
    )
    try:
        return matching(patterns, names, key)
    except PlanError:
        if is_complete:
            raise
        return None


def _of_adapter(shape: ModelShape, spec: Adapter, paths: "Paths | None") -> Trained | str:
    """All is frozen but the adapter, a classifier's head, and what is trained also."""
    trained = Trained(
        frozenset(outer_tensors(shape)),
        tuple(frozenset(layer_tensors(one)) for one, _ in layers_of(shape)),
    )
    if spec.train_also:
        assert paths
        kept = _matching(shape, paths, spec.train_also, "model.adapter.train_also")
        if kept is None:
            return f"not every weight of {shape.architecture} is known by name before it is built"
        also = _named(shape, paths, kept)
        layers = zip(trained.layers, also.layers, strict=True)
        trained = Trained(trained.outer - also.outer, tuple(all_ - its for all_, its in layers))
    if shape.classes is not None:
        heads = {n for n in trained.outer if n.startswith(("head", "class_bias", "pooler"))}
        trained = replace(trained, outer=trained.outer - heads)
    matrices = {
        name
        for one, _ in shape.layer_shapes
        for name, sizes in layer_tensors(one).items()
        if len(sizes) == 2 and name not in _NO_TARGETS
    }
    has_experts = any(one.experts for one, _ in shape.layer_shapes)
    targets = matrices - (_FEED_FORWARD if has_experts else set())
    if spec.targets != "all-linear":
        from drumline.architectures.patterns import ending_with

        assert paths
        by_path = {f"layer.{path}": name for name, path in paths.layer.items() if name in matrices}
        found = ending_with(spec.targets, by_path.keys(), "model.adapter.targets")
        targets = {by_path[path] for path in found}
    return replace(trained, lora=LoraShape(spec.rank, frozenset(targets), spec.dora, spec.dropout))


def _named(shape: ModelShape, paths: "Paths", names: Collection[str]) -> Trained:
    """These parameters as what is frozen."""
    outer = {n for n in outer_tensors(shape) if paths.outer.get(n) in names}
    layers = [
        frozenset(name for name in layer_tensors(one) if paths.in_layer(number, name) in names)
        for number, (one, _) in enumerate(layers_of(shape))
    ]
    return Trained(frozenset(outer), tuple(layers))


def _chosen(tensors: Tensors, frozen: Collection[str], is_frozen: bool) -> Tensors:
    return {name: sizes for name, sizes in tensors.items() if (name in frozen) == is_frozen}
