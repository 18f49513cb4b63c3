"""The recipe's `data.image` section: what becomes of an image before a model sees it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from drumline.recipe.section import (
    Count,
    FactoryName,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Ratio,
    Section,
)

Pair = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class RandAugment(Section):
    """So many operations, drawn for each image, of a strength from 0 to 30 (Cubuk et al. 2020)."""

    operations: Annotated[int, Field(ge=1, le=20)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class Image(Section):
    """Pixels for a model: `size` (height and width, or both as one number), scaled to `mean` and `std`.

    In training a random part is cut out (`crop: random`, of an area within `scale` and a shape within
    `ratio`), mirrored with probability `flip`, changed in colour by up to `jitter`, augmented, and a part of
    it erased with probability `erase`. In evaluation, and with `crop: center`, the shorter side becomes
    `resize` pixels and the middle is cut out; with `crop: none` the whole image becomes `size`.

    `processor`: a folder or a model of the hub with a preprocessor_config.json, whose size, mean, std and
    interpolation hold where they are not stated. `transform`: a function of the recipe's project, called with
    the image, a numpy generator and whether it is trained; it returns an array [channels, height, width].

    Of chats, `processor` is that of the model (its folder, or its name on the hub), which is called with
    `options`, such as a size; no other key is for them.
    """

    size: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    channels: Literal[1, 3] = 3
    crop: Literal["random", "center", "none"] = "random"
    resize: Count | None = None
    scale: Pair = [0.08, 1.0]
    ratio: Pair = [0.75, 1.3333]
    flip: Ratio = 0.5
    jitter: NonNegative = 0.0
    rand_augment: RandAugment | None = None
    erase: Fraction = 0.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    mean: list[float] | None = None
    std: Annotated[list[Positive] | None, Field()] = None
    processor: Name | None = None
    transform: FactoryName | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.size is None and self.processor is None:
            raise ValueError("image needs size, or a processor that has one")
        for key, (low, high) in {"scale": self.scale, "ratio": self.ratio}.items():
            if low > high:
                raise ValueError(f"{key}: {low:g} is above {high:g}")
        if self.scale[1] > 1:
            raise ValueError(f"scale: {self.scale[1]:g} of an image is more than all of it")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) not in (1, self.channels):
                raise ValueError(f"{key} has {len(values)} values for {self.channels} channels")
        return self
