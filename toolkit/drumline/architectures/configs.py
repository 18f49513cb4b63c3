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


def read_shape(
    architecture: str, config: dict[str, Any], classes: int | None = None
) -> ModelShape | str:
    """The model's shape, or a text that says why it is not known (then its memory is not known either).

    `classes`: number of classes of a classifier; None for a language model. Raises PlanError for a value
    that is not legal, or a key that looks like a misspelt known one.
    """
    reading = ENCODERS.get(architecture) or LANGUAGE_MODELS.get(architecture)
    if reading is None:
        return f"no closed form for {architecture}"
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
