"""The model that a plan names, built so that every split starts from the same weights.

Random weights are drawn block by block, each from a generator seeded by (seed, block name): no
rank ever holds more than one unsharded block, and no draw depends on how many ranks there are.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from toolkit.data.card import Card
from toolkit.data.factory import load_factory
from toolkit.errors import PlanError
from toolkit.plan.architectures import refuse_near_misses
from toolkit.recipe.schema import Recipe

ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
BATCHNORM = nn.modules.batchnorm._BatchNorm


class Skeleton:
    """A model whose blocks are materialised one at a time, by `blocks()` and then `finish()`."""

    def __init__(self, recipe: Recipe, card: Card, dtype: torch.dtype | None = None) -> None:
        self._recipe, self._seed = recipe, recipe.seed
        self._is_random = recipe.model.source == "config"
        self._dtype = dtype or (torch.bfloat16 if recipe.precision == "bf16-pure" else None)
        self.model: Any = _build(recipe, card)
        _check_vocabulary(self.model, card)
        if recipe.model.activation_checkpointing == "full":
            _enable_checkpointing(self.model)

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated blocks (a transformer's layers), each with its initial weights."""
        for name, block in named_blocks(self.model):
            self._materialise(name, list(block.modules()))
            yield block
            for parameter in block.parameters():  # sharding made new ones
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]

    def finish(self) -> nn.Module:
        """Everything outside the blocks; then weights that are tied are tied."""
        inside = {id(m) for _, block in named_blocks(self.model) for m in block.modules()}
        rest = [module for module in self.model.modules() if id(module) not in inside]
        self._materialise("rest", rest)
        if self._is_random:
            self.model.tie_weights()
        return self.model

    def whole(self) -> nn.Module:
        """All of it at once, for a rank that holds the model unsharded."""
        for _ in self.blocks():
            pass
        return self.finish()

    def _materialise(self, name: str, modules: list[nn.Module]) -> None:
        if self._is_random:
            for module in modules:
                if any(t.is_meta for t in _own_tensors(module)):
                    module.to_empty(device="cpu", recurse=False)
            torch.manual_seed(derived_seed("init", self._seed, name))
            _initialise(self.model, modules)
        if self._dtype is not None:
            for module in modules:
                _cast_parameters(module, self._dtype)


def derived_seed(*parts: Any) -> int:
    """A 63-bit seed from any sequence of names and numbers."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def named_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The units to initialise and to shard: a transformer's layers, else children with weights."""
    names = set(getattr(model, "_no_split_modules", None) or [])
    found = [(n, m) for n, m in model.named_modules() if type(m).__name__ in names]
    found = [
        (n, m)
        for n, m in found
        if not any(n != other and n.startswith(f"{other}.") for other, _ in found)
    ]
    if names:
        return found
    return [(n, m) for n, m in model.named_children() if any(True for _ in m.parameters())]


def has_batchnorm(model: nn.Module) -> bool:
    """Whether any layer keeps running statistics of the batch."""
    return any(isinstance(module, BATCHNORM) for module in model.modules())


def _build(recipe: Recipe, card: Card) -> nn.Module:
    spec = recipe.model
    if spec.source == "factory":
        assert spec.factory
        torch.manual_seed(derived_seed("init", recipe.seed, "factory"))
        try:
            model: nn.Module = load_factory(spec.factory, recipe.project)(**spec.config)
        except TypeError as error:
            raise PlanError(
                f"model.config: {spec.config} does not suit {spec.factory}: {error}"
            ) from None
        return model
    import transformers

    common: dict[str, Any] = {"attn_implementation": ATTENTION[spec.attention]}
    extra = dict(spec.config)
    if recipe.data.task == "classification":
        extra.setdefault("num_labels", card.classes)
    extra.setdefault(
        "use_cache", False
    )  # of keys and values: a copy of each that training never reads
    if spec.source == "config":
        assert spec.architecture
        kind = _kind(recipe.data.task, spec.architecture)
        try:
            known = transformers.AutoConfig.for_model(spec.architecture)
            refuse_near_misses(spec.config, set(known.to_dict()) | set(known.attribute_map))
            config = transformers.AutoConfig.for_model(spec.architecture, **extra)
        except (ValueError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0][:200]
            raise PlanError(f"model.architecture: {spec.architecture}: {first}") from None
        with torch.device("meta"):
            return kind.from_config(config, dtype=torch.float32, **common)  # type: ignore[no-any-return]
    where = spec.name or spec.path
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **extra)
        kind = _kind(recipe.data.task, config.model_type)
        return load_weights(kind, where, config, common)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:300]
        raise PlanError(f"model.{'name' if spec.name else 'path'}: {where}: {first}") from None


def _kind(task: str, model_type: str) -> Any:
    """The transformers class that has the task's head on a model of this type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if task != "classification":
        return transformers.AutoModelForCausalLM
    reads_text = model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if not reads_text and model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


def load_weights(kind: Any, where: Any, config: Any, common: dict[str, Any]) -> nn.Module:
    """A pretrained model with its weights, from safetensors only."""
    return kind.from_pretrained(  # type: ignore[no-any-return]
        where,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        **common,
    )


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


@torch.no_grad()
def _initialise(model: Any, modules: list[nn.Module]) -> None:
    """Transformers' own initialisation of these modules, children before parents.

    What is initialised is marked, so that a parent's rule cannot touch a block a second time.
    """
    from transformers.initialization import guard_torch_init_functions

    with guard_torch_init_functions():
        for module in reversed(modules):
            model._init_weights(module)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def _cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)


def _check_vocabulary(model: Any, card: Card) -> None:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and card.vocabulary is not None and card.vocabulary > vocabulary:
        raise PlanError(
            f"model.config.vocab_size: {vocabulary} < {card.vocabulary} tokens of the tokenizer. "
            f"Nearest: vocab_size {-(-card.vocabulary // 64) * 64}"
        )


def _enable_checkpointing(model: Any) -> None:
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise PlanError(
            "model.activation_checkpointing: full is for transformers models; this model comes "
            "from a factory, which can call torch.utils.checkpoint itself. Nearest: none"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
