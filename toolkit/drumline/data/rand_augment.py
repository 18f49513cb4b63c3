"""RandAugment (Cubuk et al. 2020): some operations, drawn for each image, of one strength."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageEnhance, ImageOps

from drumline.recipe.image_section import RandAugment

_MOST = 30
Operation = Callable[[Any, float], Any]
"""An image and a strength from 0 to 1, negative for those that go both ways."""


def rand_augment(image: Any, spec: RandAugment, rng: np.random.Generator) -> Any:
    """The image after so many operations; those that go both ways have a random sign."""
    names = sorted(OPERATIONS)
    for _ in range(spec.operations):
        operation = OPERATIONS[names[int(rng.integers(0, len(names)))]]
        sign = 1.0 if rng.random() < 0.5 else -1.0
        image = operation(image, sign * spec.magnitude / _MOST)
    return image


def _affine(image: Any, matrix: tuple[float, ...]) -> Any:
    return image.transform(image.size, Pillow.Transform.AFFINE, matrix, Pillow.Resampling.NEAREST)


def _enhanced(kind: Any) -> Operation:
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, s: image,
    "shear_x": lambda image, s: _affine(image, (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda image, s: _affine(image, (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda image, s: _affine(image, (1, 0, 150 / 331 * s * image.width, 0, 1, 0)),
    "translate_y": lambda image, s: _affine(image, (1, 0, 0, 0, 1, 150 / 331 * s * image.height)),
    "rotate": lambda image, s: image.rotate(30 * s),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, round(255 * (1 - abs(s)))),
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
}
"""The operations by name, with the strengths of torchvision's RandAugment."""
