"""Pretrained weights, from safetensors only: every key of the files and of the model is accounted for."""

from typing import Any

import torch
from torch import nn

from drumline.architectures.weight_names import WRAPPERS, some, wrapper_of
from drumline.errors import PlanError


def load_pretrained(
    kind: Any, where: str, config: Any, options: dict[str, Any], has_new_head: bool
) -> tuple[nn.Module, list[str]]:
    """The model with its weights, and the names of the weights that the files lack, which only a head may.

    `kind`: the auto class of transformers. `has_new_head`: the task may have another head than the files;
    then weights outside the base model, and a pooler, may be missing, have other shapes, or be left over.
    PlanError for any other key that is missing, left over, or of another shape.
    """
    model, info = kind.from_pretrained(
        where,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    body = _body(model)

    def is_of_a_head(name: str) -> bool:
        parts = name.split(".")
        return has_new_head and (parts[0] not in body or "pooler" in parts)

    missing = set(info["missing_keys"])
    mismatched = {
        key[0] if isinstance(key, tuple | list) else key for key in info["mismatched_keys"]
    }
    unexpected = set(info["unexpected_keys"])
    wrong = [
        f"{what} {some(names)}"
        for what, found in (
            ("lack", missing), ("have, unlike the model,", unexpected), ("have another shape of", mismatched),
        )
        if (names := sorted(name for name in found if not is_of_a_head(name)))
    ]  # fmt: skip
    if wrong:
        raise PlanError(f"model: the files of {where} {'; they '.join(wrong)}. {_hint(unexpected)}")
    return model, sorted(missing | mismatched)


def _body(model: Any) -> set[str]:
    """How names of the base model's weights begin, with and without its prefix.

    All but the last part of a model that is its own base model, such as SigLIP's classifier.
    """
    base = model.base_model
    parts = list(dict.fromkeys(name.partition(".")[0] for name, _ in base.named_parameters()))
    return set(parts[:-1]) if base is model else {model.base_model_prefix, *parts}


def _hint(unexpected: set[str]) -> str:
    if prefix := wrapper_of(unexpected):
        return f"Every key begins with {prefix!r}, as under {WRAPPERS[prefix]}"
    return "Nearest: the folder that the model was saved to with save_pretrained"
