"""Compares the weights in a model's files, by name and shape, with the model of its config. Pure.

The names of transformers' modules are not known here, only how many elements each layer has; so a file that
differs is found by its layers, and what is said of it names keys of the file.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from drumline.architectures.shapes import ModelShape, count, layer_tensors, outer_tensors

Sizes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""

WRAPPERS = {
    "_orig_mod.": "torch.compile; save the model that was compiled",
    "module.": "DDP; save its `module`",
    "base_model.model.": "peft; merge the adapter first",
}
"""What puts these before every key, and what to save instead."""

_SHOWN = 3
_LAYER = re.compile(r"^(?:(.*?)\.)?(\d+)\.(.+)$")
"""The stem of a layer's name, its number, and the rest."""
NOT_WEIGHTS = ("inv_freq", "masked_bias", "position_ids", "e_score_correction_bias",
                "EncDecAttention.relative_attention_bias.weight")  # fmt: skip
"""Ends of names of tensors that files have beside weights, and that transformers leaves out."""


OF_PRETRAINING = (".pooler.", "seq_relationship.")
"""Parts of names of what BERT guessed besides masked tokens when it was trained."""


def problem_with(shape: ModelShape, tensors: Sizes, has_new_head: bool) -> str:
    """What is wrong with the files of a pretrained model; "" where they hold what this shape needs.

    `has_new_head`: the task may have another head than the files, so only layers and embedding are compared.
    """
    if prefix := wrapper_of(tensors):
        return f"every key begins with {prefix!r}, as under {WRAPPERS[prefix]}"
    weights = {name: sizes for name, sizes in tensors.items() if _is_weight(shape, name, sizes)}
    layers: dict[tuple[str, int], dict[str, tuple[int, ...]]] = defaultdict(dict)
    outside: dict[str, tuple[int, ...]] = {}
    for name, sizes in weights.items():
        found = _LAYER.match(name)
        if found:
            layers[found[1] or "", int(found[2])][found[3]] = sizes
        else:
            outside[name] = sizes
    return _layer_problem(shape, layers) or _outer_problem(shape, outside, has_new_head)


def wrapper_of(names: Mapping[str, object] | set[str]) -> str:
    """The prefix of WRAPPERS that every name has; "" if there is none."""
    return next(
        (prefix for prefix in WRAPPERS if names and all(n.startswith(prefix) for n in names)), ""
    )


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _is_weight(shape: ModelShape, name: str, sizes: tuple[int, ...]) -> bool:
    if name.endswith(NOT_WEIGHTS) or (name.endswith("bias") and len(sizes) > 2):
        return False
    found = _LAYER.match(name)
    if (
        shape.architecture == "deepseek_v3" and found
    ):  # the layers after the last one predict more tokens
        return int(found[2]) < shape.layers
    if shape.pooling == "vocabulary" and any(part in name for part in OF_PRETRAINING):
        return False
    return not (shape.architecture == "siglip" and name.startswith(("text_model.", "logit_")))


def _layer_problem(
    shape: ModelShape, layers: Mapping[tuple[str, int], Mapping[str, tuple[int, ...]]]
) -> str:
    if len(layers) != shape.layers:
        return f"they hold {len(layers)} layers and the config says {shape.layers}"
    needed = sum(count(layer_tensors(one)) * number for one, number in shape.layer_shapes)
    if sum(_elements(parts) for parts in layers.values()) == needed:
        return ""
    usual = Counter((part, sizes) for parts in layers.values() for part, sizes in parts.items())
    common = {part: sizes for (part, sizes), times in usual.items() if 2 * times > len(layers)}
    for (stem, number), parts in layers.items():
        lacking = sorted(part for part in common if part not in parts)
        other = sorted(part for part in parts if part in common and parts[part] != common[part])
        for names, words in (
            (lacking, "they lack"),
            (other, "of another shape than in other layers:"),
        ):
            if names:
                return f"{words} {some([f'{stem}.{number}.{part}' for part in names])}"
    extra = [f"{stem}.{n}.{part}" for (stem, n), parts in layers.items() for part in parts
             if part not in common]  # fmt: skip
    if extra and len(shape.layer_shapes) == 1:
        return f"the model has no {some(sorted(extra))}"
    held = _elements(next(iter(layers.values())))
    return f"a layer holds {held:,} elements and the config's has {shape.layer_parameters:,}"


def _outer_problem(shape: ModelShape, outside: Sizes, has_new_head: bool) -> str:
    embedding = (shape.vocabulary, shape.hidden)
    if shape.vocabulary and embedding not in outside.values():
        return f"they hold no embedding of {shape.vocabulary} × {shape.hidden}"
    if has_new_head:
        return ""
    needed, head = count(outer_tensors(shape)), math.prod(embedding)
    held = _elements(outside)
    if held == needed or (shape.tied and held == needed + head):
        return ""
    if not shape.tied and held == needed - head:
        (only,) = (name for name, sizes in outside.items() if sizes == embedding)
        return f"of embedding and head, which the config does not tie, they hold {only} alone"
    return f"outside the layers they hold {held:,} elements ({some(sorted(outside))}), the model {needed:,}"


def _elements(tensors: Sizes) -> int:
    return sum(math.prod(sizes) for sizes in tensors.values())
