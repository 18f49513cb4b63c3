"""The processor of a model that reads images and text: how many tokens an image is, and its pixels.

transformers' own does both. In a chat's text a place of an image, one token, becomes as many tokens as the
model makes features of the image, and marks around them.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drumline.data.images import decoded
from drumline.data.tasks.base import Arrays
from drumline.errors import DataError, OfAllRows
from drumline.recipe.image_section import Image

_OF_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets")
"""What a processor returns of the text, but for the types of tokens."""
_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Names of the types of tokens: 1 of an image, 0 of text."""
_OLD_OPTIONS = ("min_pixels", "max_pixels")
"""Options that Qwen-VL's processor takes beside those that it lists."""
_CHATS_CHECKED = 3
"""Chats of known sizes of images whose tokens are compared with the processor's own."""


class Expanded(NamedTuple):
    """A chat's text with all tokens of its images; `places`: where these stand, from first letter to end.

    `elements`: of each image, how many numbers the model is given.
    """

    text: str
    places: list[tuple[int, int]]
    elements: list[int]


class ChatProcessor:
    """The processor that `data.image` names; it is loaded on first use, once in each process."""

    def __init__(self, spec: Image) -> None:
        self.spec = spec
        self._tokens_of: dict[tuple[int, int], str] = {}
        self._elements_of: dict[tuple[int, int], int] = {}
        self._checked = 0

    @cached_property
    def inner(self) -> Any:
        """Transformers' processor; DataError where it cannot be loaded, or is none of images and text."""
        assert self.spec.processor
        name = self.spec.processor
        try:
            found = _load(name)
        except (OSError, ValueError, ImportError, TypeError, AttributeError, KeyError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"data.image.processor: {name} cannot be loaded: {first}") from None
        lacking = [
            part
            for part in ("tokenizer", "image_processor", "replace_image_token", "image_token")
            if getattr(found, part, None) is None
        ]
        if lacking:
            raise DataError(
                f"data.image.processor: {name} is a {type(found).__name__} without {lacking[0]}, so where "
                "its images stand in a text cannot be told"
            )
        return found

    def begin(self) -> None:
        """Try the processor on an image of its own, before the first row; DataError where it cannot work."""
        taken = self.spec.options.keys() & {"text", "images", "return_tensors", "videos", "audio"}
        if taken:
            raise DataError(
                f"data.image.options.{taken.pop()}: the rows give it. Nearest: leave it out"
            )
        known = getattr(self.inner.image_processor, "valid_kwargs", None)
        if known is not None:
            names = known.__optional_keys__ | known.__required_keys__ | set(_OLD_OPTIONS)
            odd = sorted(self.spec.options.keys() - names)
            if odd:
                close = get_close_matches(odd[0], names, n=1)
                raise DataError(
                    f"data.image.options.{odd[0]}: {type(self.inner).__name__} has no such option. "
                    f"Nearest: {close[0] if close else ', '.join(sorted(names))}"
                )
        self._call(text=[self.place], images=[[_blank()]])

    @property
    def template(self) -> str | None:
        """The processor's chat template, if it has one."""
        found = self.inner.chat_template
        return found.get("default") if isinstance(found, dict) else found

    @property
    def place(self) -> str:
        """The token that stands for an image in the text that the chat template writes."""
        return str(self.inner.image_token)

    def expand(self, text: str, files: Sequence[bytes]) -> Expanded:
        """A chat's text with all tokens of its images.

        A processor chooses them by the size of an image, so it is asked once for each size. DataError for
        another number of places than files.
        """
        places = [one.start() for one in re.finditer(re.escape(self.place), text)]
        if len(places) != len(files):
            raise DataError(
                f"{len(files)} images, and {self.place} stands {len(places)} times in the chat's text. "
                "Nearest: the processor's own data.chat_template, and data.special_tokens_in_text=false"
            )
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        elements: list[int] = []
        done = length = 0
        for place, raw in zip(places, files, strict=True):
            tokens, size = self._tokens(raw)
            elements.append(size)
            before = text[done:place]
            start = length + len(before)
            pieces += [before, tokens]
            spans.append((start, start + len(tokens)))
            done, length = place + len(self.place), start + len(tokens)
        return Expanded("".join((*pieces, text[done:])), spans, elements)

    def _tokens(self, raw: bytes) -> tuple[str, int]:
        """What replaces the place of an image, and how many elements its inputs have."""
        image = decoded(raw, 3)
        if image.size not in self._tokens_of:
            found = self._call(text=[self.place], images=[[image]])
            (replaced,) = found["text_replacement_offsets"][0]
            self._tokens_of[image.size] = replaced["replacement"]
            self._elements_of[image.size] = self._elements(found)
        return self._tokens_of[image.size], self._elements_of[image.size]

    def _elements(self, found: Any) -> int:
        """How many elements the inputs of an image have."""
        return sum(int(np.asarray(found[name]).size) for name in self._input_names & found.keys())

    @property
    def is_checked(self) -> bool:
        """Whether as many chats were compared as there are sizes of images, and a few more."""
        return self._checked >= len(self._tokens_of) + _CHATS_CHECKED

    def check_tokens(self, text: str, files: Sequence[bytes], tokens: NDArray[np.uint32]) -> None:
        """DataError where the processor makes other tokens of a chat's text and images than these.

        `text` is that of the template, before `expand`.
        """
        images = {"images": [[decoded(raw, 3) for raw in files]]} if files else {}
        found = self._call(text=[text], **images)
        ids = np.asarray(found["input_ids"][0], dtype=np.uint32)
        if not np.array_equal(ids, tokens):
            raise OfAllRows(
                f"data.image.processor: its own tokenizer makes {len(ids)} tokens of this row, and "
                f"data.tokenizer {len(tokens)}, or others. Nearest: data.tokenizer, the processor's folder"
            )
        for name in found.keys() - {*_OF_TEXT, *self._input_names}:
            types = self.types(ids[None])
            if name != self.types_name or not np.array_equal(np.asarray(found[name]), types):
                raise OfAllRows(
                    f"data.image.processor: {type(self.inner).__name__} gives its model {name}, which is not "
                    "made here"
                )
        self._checked += 1

    @cached_property
    def _input_names(self) -> set[str]:
        """Names of the inputs that images become."""
        return set(self._call(images=[[_blank()]])) - {*_OF_TEXT, *_TYPES}

    @cached_property
    def types_name(self) -> str | None:
        """The name under which the model is given the types of tokens, if it is."""
        found = self._call(text=[self.place], images=[[_blank()]])
        return next((name for name in _TYPES if name in found), None)

    def types(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        """The types of tokens, int64 of the same shape: 1 where a feature of an image stands."""
        if self.types_name is None:
            return np.zeros(ids.shape, dtype=np.int64)
        found = self.inner.create_mm_token_type_ids(ids.astype(np.int64).tolist())
        return np.asarray(found, dtype=np.int64)

    def is_feature(self, ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Where a feature of an image stands."""
        return np.isin(ids, self.feature_tokens)

    @property
    def feature_tokens(self) -> list[int]:
        """The ids of the tokens where features of images stand."""
        return [int(one) for one in self.inner.image_token_ids if one is not None]

    def inputs(self, rows: Sequence[Sequence[bytes]]) -> Arrays:
        """The model's inputs of the images of these rows by name, such as pixel_values."""
        if not any(rows):
            return {}
        found = self._call(images=[[decoded(raw, 3) for raw in files] for files in rows])
        return {name: _array(found[name]) for name in sorted(self._input_names & found.keys())}

    def _call(self, **given: Any) -> Any:
        """What the processor makes of these; DataError where it refuses."""
        options = {"add_special_tokens": False} if "text" in given else {}
        if "text" in given:
            options["return_text_replacement_offsets"] = True
        try:
            return self.inner(**given, **options, **self.spec.options, return_tensors="np")
        except (ValueError, TypeError, KeyError, IndexError) as error:
            told = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"data.image.processor: it refuses the images: {told[:400]}") from None


def _array(values: Any) -> NDArray[Any]:
    found = np.asarray(values)
    return found.astype(np.float32) if found.dtype.kind == "f" else found


def _blank() -> Any:
    from PIL import Image as Pillow

    return Pillow.new("RGB", (64, 64))


def _load(name: str) -> Any:
    """The processor of a folder or a model of the hub; one of videos, too, also without torchvision."""
    import transformers
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
    kind = _class_of(name)
    if "video_processor" not in kind.get_attributes():
        return transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
    # transformers' processors of videos need torchvision; those of images do not.
    images = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    parts = {"image_processor": images, "tokenizer": tokenizer, "video_processor": None}
    only_images: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": _no_check})
    stated, _ = kind.get_processor_dict(name)
    arguments = [parts[part] for part in kind.get_attributes()]
    return only_images.from_args_and_dict(arguments, stated)


def _no_check(processor: Any, name: str, part: Any) -> None:
    """In place of a check that the video processor is one."""


def _class_of(name: str) -> Any:
    """The class of a processor, as its files or its model's config state it; ValueError where none does."""
    import json

    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import cached_file

    files = (
        "processor_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "config.json",
    )
    for file in files:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is None:
            continue
        with open(path, encoding="utf-8") as text:
            config = json.load(text)
        stated = config.get("processor_class")
        if file == "config.json":
            stated = PROCESSOR_MAPPING_NAMES.get(config.get("model_type"))
        if stated and hasattr(transformers, stated):
            return getattr(transformers, stated)
    raise ValueError("its files state no processor_class that transformers has")
