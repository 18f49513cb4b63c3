"""Images: decoded by Pillow, cut, augmented and scaled. Every random choice follows from a sample's seed."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.factory import load_factory
from drumline.data.processors import processor_file
from drumline.errors import DataError
from drumline.recipe.image_section import Image

Pixels = NDArray[np.float32]
"""[channels, height, width], scaled."""

_PILLOW_MODES = {1: "L", 3: "RGB"}
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and standard deviation of ImageNet's pixels, which most models were trained with."""
_DEEP_MODES = ("I;16", "I", "F", "I;16B")
_PNG, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24
"""What a PNG begins with, and the byte with its bits per channel, which Pillow cuts to 8 of colours."""
_INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers."""
_ATTEMPTS = 10
_CENTRE = 0.875
"""Share of the shorter side that is kept in evaluation, where `resize` is not stated."""


@dataclass(frozen=True)
class Pipeline:
    """An `image` section with nothing unset: sizes in pixels, mean and std per channel, [channels, 1, 1].

    `resize`: what the shorter side becomes before the middle is cut out; None where nothing is cut off.
    """

    spec: Image
    height: int
    width: int
    resize: int | None
    mean: Pixels
    std: Pixels
    resample: Any
    transform: Callable[..., Any] | None

    @property
    def shape(self) -> list[int]:
        """Of an image as the model sees it."""
        return [self.spec.channels, self.height, self.width]

    def pixels(self, raw: bytes, seed: int, is_trained: bool) -> Pixels:
        """The image in an encoded file as the model sees it."""
        image = decoded(raw, self.spec.channels)
        rng = np.random.Generator(np.random.Philox(key=seed))
        if self.transform:
            return self._by_project(image, rng, seed, is_trained)
        if is_trained and self.spec.crop == "random":
            image = self._random_crop(image, rng)
        elif self.resize is None:
            image = image.resize((self.width, self.height), self.resample)
        else:
            image = self._centre(image, self.resize)
        if is_trained:
            image = self._augmented(image, rng)
        values = np.asarray(image, dtype=np.float32) / np.float32(255)
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        scaled = np.asarray((values - self.mean) / self.std, dtype=np.float32)
        if is_trained and self.spec.erase and rng.random() < self.spec.erase:
            _erase(scaled, rng)
        return scaled

    def _random_crop(self, image: Any, rng: np.random.Generator) -> Any:
        """A part of random area and shape, resized; the middle where none fits after ten attempts."""
        width, height = image.size
        low, high = self.spec.ratio
        for _ in range(_ATTEMPTS):
            area = width * height * rng.uniform(self.spec.scale[0], self.spec.scale[1])
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = (
                    int(rng.integers(0, width - w + 1)),
                    int(rng.integers(0, height - h + 1)),
                )
                break
        else:
            w, h = min(width, round(height * high)), min(height, round(width / low))
            left, top = (width - w) // 2, (height - h) // 2
        box = (left, top, left + w, top + h)
        return image.resize((self.width, self.height), self.resample, box=box)

    def _centre(self, image: Any, shorter: int) -> Any:
        """The middle, after the shorter side has become so many pixels."""
        width, height = image.size
        if width <= height:
            size = shorter, int(shorter * height / width)
        else:
            size = int(shorter * width / height), shorter
        image = image.resize(size, self.resample)
        left, top = (
            round((a - b) / 2) for a, b in zip(size, (self.width, self.height), strict=True)
        )
        return image.crop((left, top, left + self.width, top + self.height))

    def _augmented(self, image: Any, rng: np.random.Generator) -> Any:
        from PIL import ImageEnhance, ImageOps

        if self.spec.flip and rng.random() < self.spec.flip:
            image = ImageOps.mirror(image)
        if self.spec.rand_augment:
            from drumline.data.rand_augment import rand_augment

            image = rand_augment(image, self.spec.rand_augment, rng)
        if self.spec.jitter:
            kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
            low = max(0.0, 1 - self.spec.jitter)
            for kind in rng.permutation(3):
                factor = rng.uniform(low, 1 + self.spec.jitter)
                image = kinds[kind](image).enhance(factor)
        return image

    def _by_project(
        self, image: Any, rng: np.random.Generator, seed: int, is_trained: bool
    ) -> Pixels:
        """What the project's function makes of it; other generators that it may use are seeded, too."""
        import random
        import sys

        assert self.transform
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch = sys.modules.get("torch")  # which torchvision's transforms draw from
        if torch:
            torch.default_generator.manual_seed(seed % 2**63)
        found = np.asarray(self.transform(image, rng, is_trained, **self.spec.options))
        if list(found.shape) != self.shape:
            raise DataError(
                f"data.image.transform: {self.spec.transform} made an array of shape {list(found.shape)}, "
                f"and data.image has {self.shape}"
            )
        return np.asarray(found, dtype=np.float32)


def pipeline(spec: Image, project: str | None) -> Pipeline:
    """What a section means, with what its processor states; DataError where that cannot be read."""
    try:
        from PIL import Image as Pillow
    except ImportError:
        raise DataError(
            "data.image: pillow is not installed. Nearest: pip install 'drumline[images]'"
        ) from None
    stated = _processor(spec) if spec.processor else {}
    size = spec.size if spec.size is not None else stated.get("size")
    if size is None:
        raise DataError(
            f"data.image.processor: {spec.processor} states no size. Nearest: data.image.size=224"
        )
    height, width = (size, size) if isinstance(size, int) else size
    shorter = spec.resize or stated.get("resize")
    if shorter is None and not spec.processor:
        shorter = round(min(height, width) / _CENTRE)
    if spec.crop == "none":
        shorter = None
    mean = spec.mean or stated.get("mean") or _IMAGENET[0][: spec.channels]
    std = spec.std or stated.get("std") or _IMAGENET[1][: spec.channels]
    number = stated.get("resample", 2)
    if spec.interpolation is not None:
        number = _INTERPOLATIONS[spec.interpolation]
    return Pipeline(
        spec=spec,
        height=height,
        width=width,
        resize=shorter and max(shorter, height, width),
        mean=_per_channel(mean, spec.channels),
        std=_per_channel(std, spec.channels),
        resample=Pillow.Resampling(number),
        transform=load_factory(spec.transform, project) if spec.transform else None,
    )


def decoded(raw: bytes, channels: int) -> Any:
    """The image of an encoded file, upright, with so many channels of 8 bits; DataError for anything else."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    try:
        with Pillow.open(io.BytesIO(raw)) as image:
            _refuse_deep(image.mode, raw)
            return ImageOps.exif_transpose(image).convert(_PILLOW_MODES[channels])
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise whatever they come to
        raise DataError(f"no image that can be read: {error}") from None


def check(raw: bytes) -> None:
    """DataError unless all of the file can be decoded, at the smallest size that its format can be."""
    from PIL import Image as Pillow

    try:
        with Pillow.open(io.BytesIO(raw)) as image:
            _refuse_deep(image.mode, raw)
            image.draft("RGB", (1, 1))  # of a JPEG, an eighth of its size; all of the file is read
            image.load()
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise whatever they come to
        raise DataError(f"no image that can be read: {error}") from None


def _refuse_deep(mode: str, raw: bytes) -> None:
    is_deep_png = raw.startswith(_PNG) and raw[_PNG_DEPTH] > 8
    if mode in _DEEP_MODES or is_deep_png:
        raise DataError(
            f"an image of mode {mode}, with more than 8 bits a channel, which converting would clip. "
            "Nearest: save it with 8 bits a channel"
        )


def _per_channel(values: list[float], channels: int) -> Pixels:
    whole = values * channels if len(values) == 1 else values[:channels]
    return np.array(whole, dtype=np.float32).reshape(-1, 1, 1)


_HARMLESS = {
    "image_processor_type", "feature_extractor_type", "processor_class", "size", "crop_size", "crop_pct",
    "do_resize", "do_center_crop", "do_normalize", "do_rescale", "do_convert_rgb", "image_mean", "image_std",
    "resample", "rescale_factor", "default_to_square", "_valid_processor_keys", "data_format",
    "input_data_format", "return_tensors", "device", "num_channels", "image_seq_length",
    "disable_grouping",
}  # fmt: skip
"""Keys of a preprocessor_config.json that are followed, or that change no pixel."""
_WARPED_FROM = 384
"""From this shorter side on, ConvNeXt's processor resizes both sides and cuts nothing off."""


def _processor(spec: Image) -> dict[str, Any]:
    """Size (and the shorter side before it), mean, std and interpolation of a preprocessor_config.json.

    DataError where it says anything else that changes pixels.
    """
    assert spec.processor
    path = processor_file(spec.processor)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if "pretrained_cfg" in config:
            return _of_timm(config["pretrained_cfg"], spec)
        found = _scale(config, spec) | (_cut(config) if spec.size is None else {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"data.image.processor: {path}: {error}") from None
    if config.get("resample") is not None:
        found["resample"] = config["resample"]
    odd = [
        key for key, value in config.items() if key not in _HARMLESS and value not in (None, False)
    ]
    if odd:
        raise DataError(
            f"data.image.processor: {path}: {odd[0]}: {config[odd[0]]!r} is not followed here. Nearest: "
            "data.image.transform, a function of your own"
        )
    return found


def _of_timm(config: dict[str, Any], spec: Image) -> dict[str, Any]:
    """What timm's own transform does in evaluation; ValueError for a crop that is not its middle."""
    if config.get("crop_mode", "center") != "center":
        raise ValueError(
            f"crop_mode: {config['crop_mode']} is not followed here. Nearest: data.image.transform, a "
            "function of your own"
        )
    found = {
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "resample": _INTERPOLATIONS[config.get("interpolation") or "bicubic"],
    }
    if spec.size is None:
        _, height, width = config["input_size"]
        share = config.get("crop_pct") or _CENTRE
        found |= {"size": [height, width], "resize": math.floor(min(height, width) / share)}
    return found


def _scale(config: dict[str, Any], spec: Image) -> dict[str, Any]:
    """The mean and std that a processor states; ValueError where the recipe must."""
    factor = config.get("rescale_factor", 1 / 255)
    if config.get("do_rescale", True) is False or abs(factor * 255 - 1) > 1e-3:
        raise ValueError(
            f"rescale_factor: {factor if config.get('do_rescale', True) else 1} and not 1/255. Nearest: "
            "data.image.transform, a function of your own"
        )
    if config.get("do_normalize", True) is False:
        return {"mean": [0.0], "std": [1.0]}
    found = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    lacking = [key for key, value in found.items() if not value and not getattr(spec, key)]
    if lacking:
        raise ValueError(
            f"image_{lacking[0]} is not stated. Nearest: data.image.{lacking[0]}=[0.5]"
        )
    return {
        key: value if isinstance(value, list) else [value] for key, value in found.items() if value
    }


def _cut(config: dict[str, Any]) -> dict[str, Any]:
    """The size of what is cut out, and of the shorter side before; ValueError for sizes that vary."""
    size, crop = _sides(config.get("size")), _sides(config.get("crop_size"))
    if config.get("do_resize", True) is False:
        raise ValueError("do_resize: false leaves images of any size. Nearest: data.image.size=224")
    if config.get("do_center_crop") and crop:
        if isinstance(config["size"], dict) and "height" in config["size"]:
            raise ValueError("size has a height, before a crop. Nearest: data.image.size=224")
        return {"size": list(crop), "resize": min(size) if size else None}
    if not size:
        return {}
    if share := config.get("crop_pct"):  # ConvNeXt's
        is_warped = min(size) >= _WARPED_FROM
        return {"size": list(size), "resize": None if is_warped else int(min(size) / share)}
    if isinstance(config["size"], dict) and "shortest_edge" in config["size"]:
        raise ValueError(
            "size: shortest_edge keeps the shape of each image, and a batch has one size. Nearest: "
            f"data.image.size={min(size)}"
        )
    return {"size": list(size)}


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width of what transformers calls a size; of a shortest edge, twice that."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def _erase(values: Pixels, rng: np.random.Generator) -> None:
    """Fill a rectangle with noise, in place (Zhong et al. 2020)."""
    channels, height, width = values.shape
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            values[:, top : top + h, left : left + w] = rng.standard_normal((channels, h, w))
            return
