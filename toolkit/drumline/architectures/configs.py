"""Reads a ModelShape from a transformers config, for the known architectures. Pure.

Defaults are those of the config classes of transformers 5; a test compares every parameter count with the
real model built on the meta device.
"""

from dataclasses import replace
from typing import Any

from drumline.architectures.decoders import LANGUAGE_MODELS
from drumline.architectures.encoders import ENCODERS
from drumline.architectures.fields import refuse_near_misses
from drumline.architectures.shapes import ACTIVATIONS, ModelShape

OTHER_HEADS = ("token_classification", "masked_lm", "seq2seq")
"""Heads that are neither of a causal language model nor of whole rows."""


def read_shape(
    architecture: str,
    config: dict[str, Any],
    classes: int | None = None,
    head: str | None = None,
) -> ModelShape | str:
    """The model's shape, or a text that says why it is not known (then its memory is not known either).

    `classes`: number of classes of a classifier; None for a language model. `head`: the task's
    (`recipe/data_section.py`), where it is neither of a causal language model nor of whole rows. Raises
    PlanError for a value that is not legal, or a key that looks like a misspelt known one.
    """
    reading = ENCODERS.get(architecture) or LANGUAGE_MODELS.get(architecture)
    if reading is None:
        return f"no closed form for {architecture}"
    if head in OTHER_HEADS:
        found = read_shape(architecture, config, classes or 1) if head != "seq2seq" else ""
        if not isinstance(found, str) and found.family in ("bert", "deberta"):
            return _with_head(found, str(head), config)
        return f"no closed form for {architecture} with the head of {head}"
    if classes is None and architecture in ENCODERS:
        return f"no closed form for {architecture} as a language model"
    config = {**config, **(config.get(reading.nested) or {})}
    refuse_near_misses(config, (*reading.keys, *filter(None, [reading.nested])))
    stated = config.get(reading.activation_key, reading.activation)
    activation = reading.activations.get(stated, stated)
    if activation not in ACTIVATIONS:
        return f"no closed form for {architecture} with {reading.activation_key} {stated}"
    shape = reading.read(architecture, config, classes)
    if isinstance(shape, str):
        return shape
    segments = tuple(
        (replace(segment, activation=activation), number) for segment, number in shape.segments
    )
    return replace(shape, activation=activation, segments=segments)


def _with_head(shape: ModelShape, head: str, config: dict[str, Any]) -> ModelShape:
    """An encoder of texts with another head than a classifier's of rows."""
    if head == "token_classification":
        return replace(shape, pooling="tokens")
    is_tied = config.get("tie_word_embeddings", True)
    return replace(
        shape,
        pooling="vocabulary",
        classes=None,
        tied=is_tied,
        has_head_bias=True,
        has_embedding_block=shape.has_embedding_block and not is_tied,
    )
