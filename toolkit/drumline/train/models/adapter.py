"""LoRA adapters by peft: inserted on the meta device, drawn from (seed, name), exported in peft's format.

A linear layer becomes peft's own, whose `base_layer` is the frozen one. Its first values are peft's (A by
kaiming_uniform with a = √5, B zero, DoRA's magnitudes the norms of the base's rows), but drawn from a
generator of each layer, so that they depend neither on the split nor on which other layers have adapters.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drumline.architectures.patterns import ending_with, matching
from drumline.errors import PlanError
from drumline.recipe.model_section import Adapter
from drumline.train.models.blocks import named_blocks
from drumline.train.models.quantized import QuantizedLinear
from drumline.train.models.seeds import derived_seed

_NAME = "default"
_MARK = ".lora_"
_ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Last parts of the names of layers that choose experts; `all-linear` leaves them out."""
_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Last parts of names that peft takes for those of experts; left out of a model with experts, too."""


def add_adapter(model: nn.Module, spec: Adapter, trained: Collection[str]) -> None:
    """Insert the adapter, and freeze all other parameters but `trained` and those under `train_also`.

    PlanError where a name of the recipe matches nothing.
    """
    from peft import inject_adapter_in_model

    names = {name for name, _ in model.named_parameters()}
    targets = _targets(model, spec)
    also = matching(spec.train_also, names, "model.adapter.train_also") | set(trained)
    kept = [p for name, p in model.named_parameters() if name in also]
    inject_adapter_in_model(
        lora_config(spec, sorted(targets)), model, _NAME, low_cpu_mem_usage=True
    )
    found = set(adapted_layers(model).values())
    if found != targets:  # peft takes a feed-forward's name for that of experts in some models
        raise PlanError(
            f"model.adapter.targets: peft would adapt {_some(found - targets) or 'nothing'} instead of "
            f"{_some(targets - found)}. Nearest: {', '.join(_names_outside(targets, targets - found))}"
        )
    for parameter in kept:
        parameter.requires_grad_(True)


def lora_config(spec: Adapter, targets: list[str]) -> Any:
    """The adapter for these layers as a configuration of peft."""
    from peft import LoraConfig

    alpha: Any = int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha
    return LoraConfig(
        r=spec.rank,
        lora_alpha=alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        use_dora=spec.dora,
        use_rslora=spec.rslora,
    )


def adapted_layers(model: nn.Module) -> dict[int, str]:
    """The layers of a model that have an adapter, by their ids, with their names."""
    return {
        id(layer): name
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }


def is_of_adapter(name: str) -> bool:
    """Whether a module or parameter of this name belongs to an adapter."""
    return _MARK in name


@torch.no_grad()
def draw_adapter(layer: Any, seed: int, name: str) -> None:
    """Give the adapter of a layer, whose base has its weights, its first values."""
    first, second = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    torch.manual_seed(derived_seed("init", seed, name))
    nn.init.kaiming_uniform_(first, a=math.sqrt(5))
    nn.init.zeros_(second)
    if _NAME in layer.lora_magnitude_vector:
        base = layer.get_base_layer()
        rows = base.weight.T if _is_transposed(base) else base.weight
        layer.lora_magnitude_vector[_NAME].weight.copy_(torch.linalg.norm(rows.float(), dim=1))


def export_adapter(model: Any, spec: Adapter, base: str, target: Path) -> None:
    """Write the trained weights of a model with an adapter into `target`, in peft's format.

    `base`: what the model was loaded from, by name or path.
    """
    from peft import TaskType
    from safetensors.torch import save_file

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = {name.rpartition(".")[0] for name in trained if not is_of_adapter(name)}
    config = lora_config(spec, _shortest(model))
    config.base_model_name_or_path = base
    is_classifier = "SequenceClassification" in type(model).__name__
    config.task_type = TaskType.SEQ_CLS if is_classifier else TaskType.CAUSAL_LM
    config.modules_to_save = sorted(whole) or None
    config.inference_mode = True
    config.save_pretrained(target)
    tensors = {
        f"base_model.model.{_name_in_file(name)}": p.detach().cpu().contiguous()
        for name, p in trained.items()
    }
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Context in which the layers compute what the base model does; the adapters stay trainable."""
    layers: list[Any] = [model.get_submodule(name) for name in adapted_layers(model).values()]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Add every adapter to its base layer, in the dtype that the weights have, and take it out.

    Quantised weights are widened, so that the result is what was trained on.
    """
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.unpack()
    for name in adapted_layers(model).values():
        adapted: Any = model.get_submodule(name)
        adapted.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted.get_base_layer())


def _name_in_file(name: str) -> str:
    """A parameter's name without the adapter's, as in peft's files; a magnitude's has no `weight` there."""
    if "lora_magnitude_vector" in name:
        return name.replace(f".{_NAME}.weight", "")
    return name.replace(f".{_NAME}.", ".") if is_of_adapter(name) else name


def _targets(model: nn.Module, spec: Adapter) -> set[str]:
    """Full names of the layers that get an adapter."""
    linear = {name for name, module in model.named_modules() if _is_linear(module)}
    if spec.targets != "all-linear":
        return ending_with(spec.targets, linear, "model.adapter.targets")
    left_out = _FEED_FORWARD if _has_experts(model) else set()
    found = {name for name in linear_in_blocks(model) if name.rpartition(".")[2] not in left_out}
    if not found:
        raise PlanError(
            "model.adapter.targets: all-linear finds no linear layer in the model's blocks. Nearest: "
            f"{', '.join(sorted(linear)[:3]) or 'a model with linear layers'}"
        )
    return found


def _has_experts(model: nn.Module) -> bool:
    """Whether the model has weights of all experts of a layer in one tensor."""
    return any(".experts." in name and p.ndim == 3 for name, p in model.named_parameters())


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3])


def _names_outside(targets: set[str], wrong: set[str]) -> list[str]:
    """Last parts of the names of the layers that peft adapts as it should."""
    bad = {name.rpartition(".")[2] for name in wrong}
    return sorted({name.rpartition(".")[2] for name in targets} - bad) or ["all-linear"]


def linear_in_blocks(model: nn.Module) -> set[str]:
    """Full names of the linear layers in the model's blocks, but for routers."""
    inside = tuple(f"{name}." for name, _ in named_blocks(model))
    return {
        name
        for name, module in model.named_modules()
        if _is_linear(module)
        and name.startswith(inside)
        and name.rpartition(".")[2] not in _ROUTERS
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


def _shortest(model: nn.Module) -> list[str]:
    """The last parts of the names of the layers with adapters, where they name no other layer."""
    with_adapter = set(adapted_layers(model).values())
    without = {
        name
        for name, module in model.named_modules()
        if _is_linear(module) and not is_of_adapter(name) and not name.endswith(".base_layer")
    }
    ends = {name.rpartition(".")[2] for name in with_adapter}
    if ends & {name.rpartition(".")[2] for name in without}:
        return sorted(with_adapter)
    return sorted(ends)
