"""Applies edits to a model between building and materialising: an adapter, freezing, the project's own.

An edit changes the model in place, and in the same way on every rank. Weights are still on the meta device
when the recipe's `adapter` and `frozen` are applied. `model.edits` name functions of its project; pretrained
weights are loaded before these, all of them on every rank.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from drumline.architectures.patterns import matching
from drumline.architectures.trained import NF4_BLOCK
from drumline.data.factory import load_factory
from drumline.errors import PlanError
from drumline.recipe.schema import Recipe
from drumline.train.models.adapter import add_adapter, linear_in_blocks
from drumline.train.models.quantized import quantise


def choose_trained(model: nn.Module, recipe: Recipe, new: Collection[str]) -> None:
    """Insert the recipe's adapter or freeze what it names; `new`: parameters that no file holds."""
    spec = recipe.model
    if spec.quantization != "none":
        quantise(model, spec.quantization, _to_quantise(model, spec.quantization))
    if spec.adapter:
        add_adapter(model, spec.adapter, {*new, *head_of(model, recipe)})
    names = {name for name, _ in model.named_parameters()}
    frozen = matching(spec.frozen, names, "model.frozen")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    _refuse_nothing_trainable(model)


def _to_quantise(model: nn.Module, kind: str) -> set[str]:
    """The linear layers of the model's blocks that can be quantised; PlanError if there are none."""
    found = set()
    for name in linear_in_blocks(model):
        layer = model.get_submodule(name)
        fits = kind == "int8" or getattr(layer, "in_features", 1) % NF4_BLOCK == 0
        if isinstance(layer, nn.Linear) and fits:
            found.add(name)
    if not found:
        raise PlanError(
            f"model.quantization: {kind} finds no linear layer in the model's blocks whose inputs are a "
            f"multiple of {NF4_BLOCK}. Nearest: model.quantization=none"
        )
    return found


def apply_edits(model: nn.Module, recipe: Recipe) -> None:
    """Apply the project's edits in order; PlanError where no parameter is trainable afterwards."""
    for name in recipe.model.edits:
        load_factory(name, recipe.project)(model)
    _refuse_nothing_trainable(model)


def head_of(model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of a classifier's parameters outside the pretrained model's body; none of other models."""
    if not recipe.data.facts.has_labels or not hasattr(model, "base_model_prefix"):
        return []
    is_of_head = head_rule(model)
    return [name for name, _ in model.named_parameters() if is_of_head(name)]


def head_rule(model: Any) -> Callable[[str], bool]:
    """Whether a weight of this name lies outside the pretrained model's body.

    timm's models say which of their layers are the classifier.
    """
    wrapped = getattr(model, "timm_model", None)
    if wrapped is not None:
        stated = wrapped.pretrained_cfg.get("classifier") or ()
        names = [stated] if isinstance(stated, str) else stated
        return lambda name: name.startswith(tuple(f"timm_model.{one}." for one in names))
    body = _body_of(model)
    return lambda name: name.partition(".")[0] not in body


def _body_of(model: nn.Module) -> set[str]:
    """How names of the base model's weights begin, with and without its prefix.

    All but the last part of a model that is its own base model, such as SigLIP's classifier.
    """
    base = model.base_model
    parts = list(dict.fromkeys(name.partition(".")[0] for name, _ in base.named_parameters()))  # type: ignore[operator, union-attr]
    return set(parts[:-1]) if base is model else {str(model.base_model_prefix), *parts}


def _refuse_nothing_trainable(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError("model: no parameter is trainable. Nearest: fewer frozen ones")
