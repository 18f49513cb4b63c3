"""Chats as token ids, with the tokens that are trained: those of what the assistant says.

A text is tokenised as a whole, and a token counts if all of its letters are the assistant's. Where a token
would have letters of both sides, the text is tokenised in pieces, as it is when the model answers. Words of
a message that look like a special token, such as <|im_end|>, are tokenised as text.
"""

import itertools
import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.chats.anchors import Span
from drumline.data.chats.messages import Chat, ChatFormat, chat_of
from drumline.data.chats.placed_images import (
    images_of,
    in_parts,
    refuse_lost_words,
    with_images,
)
from drumline.data.chats.processor import ChatProcessor
from drumline.data.chats.template import ChatTemplate, find_template
from drumline.data.tasks.base import Row
from drumline.data.tokenizers import Request, Tokenizer, Tokens
from drumline.errors import DataError
from drumline.recipe.data_section import Data

_PRIVATE, _PRIVATE_END = 0xE100, 0xF8FF
"""Letters that stand for words like a special token while a template is rendered."""


@dataclass(frozen=True)
class Rendered:
    """A chat's text; `spans`: the letters that are trained; `words`: what private letters of the text are.

    `images`: the files of its images, whose tokens stand at `places`, which are not trained, and have so many
    `elements` as inputs of the model. `template_text`: the text before each place had all of its image's
    tokens.
    """

    text: str
    spans: list[Span]
    words: dict[str, str]
    images: tuple[bytes, ...] = ()
    places: tuple[Span, ...] = ()
    elements: tuple[int, ...] = ()
    template_text: str = ""

    @property
    def bounds(self) -> tuple[int, ...]:
        """The places where what is trained begins or ends."""
        return tuple(sorted({place for span in self.spans for place in span}))

    @property
    def request(self) -> Request | None:
        """What the tokenizer is asked, if it can be asked ahead."""
        return None if self.words else ("encode_offsets", self.text, self.bounds)


class ChatRows:
    """Renders and tokenises the chats of one source."""

    def __init__(
        self,
        form: ChatFormat,
        data: Data,
        tokenizer: Tokenizer,
        processor: ChatProcessor | None = None,
    ) -> None:
        self.form, self._data, self._processor = form, data, processor
        self._takes_parts = True
        facts = tokenizer.chat
        own = processor.template if processor else None
        self._template: ChatTemplate = find_template(
            data.chat_template,
            own or facts.template,
            {**facts.variables, **data.chat_template_options},
        )
        self._specials = () if data.special_tokens_in_text else tuple(filter(None, facts.specials))

    def render(self, row: Row) -> Rendered:
        """The text of a row; DataError where its chat is wrong, or what is trained cannot be told."""
        chat = chat_of(row, self.form, self._data)
        if self._processor:
            chat = with_images(chat, images_of(row, chat.messages, self._data))
        chat, words = self._guarded(self._last_only(chat))
        text, spans = self._written(chat)
        if self._data.train_on == "all":
            spans = [(0, len(text))]
        else:
            turns = [n for n, one in enumerate(chat.messages) if one["role"] == "assistant"]
            spans = [span for n, span in zip(turns, spans, strict=True) if chat.trained[n]]
        if self._processor is None:
            return Rendered(text, spans, words)
        return self._with_images(text, spans, words, chat.images)

    def _written(self, chat: Chat) -> tuple[str, list[Span]]:
        """The template's text and the assistant's words in it.

        Templates of processors take contents as parts, as texts where there is no image, or both; the form
        that worked for the row before is tried first.
        """
        if self._processor is None:
            return self._template.text_of(chat)
        first_error: DataError | None = None
        for has_parts in (self._takes_parts, not self._takes_parts):
            try:
                text, spans = self._template.text_of(in_parts(chat, all_of_them=has_parts))
                refuse_lost_words(chat, text)
            except DataError as error:
                first_error = first_error or error
                continue
            self._takes_parts = has_parts
            return text, spans
        assert first_error
        raise first_error

    def _with_images(
        self, text: str, spans: list[Span], words: dict[str, str], images: tuple[bytes, ...]
    ) -> Rendered:
        """A chat whose images have all of their tokens."""
        assert self._processor
        whole, places, elements = self._processor.expand(text, images)
        added = [end - start - len(self._processor.place) for start, end in places]
        starts = [start - sum(added[:n]) for n, (start, _) in enumerate(places)]

        def moved(letter: int) -> int:
            return letter + sum(added[: bisect_left(starts, letter)])

        moved_spans = [(moved(start), moved(end)) for start, end in spans]
        return Rendered(whole, moved_spans, words, images, tuple(places), tuple(elements), text)

    def tokens(self, rendered: Rendered, tokenizer: Tokenizer) -> tuple[Tokens, NDArray[np.bool_]]:
        """Token ids, and which of them are trained, bool [n]."""
        if self._processor and not self._processor.is_checked:
            plain, _ = tokenizer.encode_offsets(rendered.text, ())
            self._processor.check_tokens(rendered.template_text, rendered.images, plain)
        if not rendered.words:
            ids, places = tokenizer.encode_offsets(rendered.text, rendered.bounds)
            if not _crosses(places, rendered.bounds):
                return ids, _inside(places, rendered.spans) & ~_touching(places, rendered.places)
        parts = list(_parts(rendered, tokenizer))
        return (
            np.concatenate([ids for ids, _ in parts]).astype(np.uint32),
            np.concatenate([inside for _, inside in parts]),
        )

    def _last_only(self, chat: Chat) -> Chat:
        if self._data.train_on != "last_assistant":
            return chat
        last = len(chat.messages) - 1
        trained = [allowed and n == last for n, allowed in enumerate(chat.trained)]
        return replace(chat, trained=trained)

    def _guarded(self, chat: Chat) -> tuple[Chat, dict[str, str]]:
        """The chat with a private letter for every word in it that looks like a special token."""
        words: dict[str, str] = {}
        written = set(json.dumps([chat.messages, chat.tools], ensure_ascii=False))
        free = (letter for n in range(_PRIVATE, _PRIVATE_END) if (letter := chr(n)) not in written)

        def guard(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: guard(item) for key, item in value.items()}
            if isinstance(value, list):
                return [guard(item) for item in value]
            if isinstance(value, str):
                for special in self._specials:
                    if special in value:
                        letter = next(free)
                        words[letter] = special
                        value = value.replace(special, letter)
            return value

        messages = [{**guard(one), "role": one["role"]} for one in chat.messages]
        return replace(chat, messages=messages, tools=guard(chat.tools)), words


def _inside(places: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens lie wholly within one of the spans, and have a letter."""
    found = np.zeros(len(places), dtype=bool)
    for start, end in spans:
        found |= (places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
    return found


def _touching(places: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens have a letter within one of the spans."""
    found = np.zeros(len(places), dtype=bool)
    for start, end in spans:
        found |= (places[:, 0] < end) & (places[:, 1] > start)
    return found


def _crosses(places: NDArray[np.int64], bounds: tuple[int, ...]) -> bool:
    """Whether a token has letters on both sides of a bound."""
    edges = np.asarray(bounds, dtype=np.int64)
    first = np.searchsorted(edges, places[:, 0], "right")
    last = np.searchsorted(edges, places[:, 1], "left")
    return bool((first < last).any())


def _parts(rendered: Rendered, tokenizer: Tokenizer) -> Iterator[tuple[Tokens, NDArray[np.bool_]]]:
    """Token ids of the pieces between bounds and private letters, and of the words that these stand for."""
    text = rendered.text
    cuts = [n for n, letter in enumerate(text) if letter in rendered.words]
    edges = sorted({0, len(text), *rendered.bounds, *cuts, *(n + 1 for n in cuts)})
    for start, end in itertools.pairwise(edges):
        piece = text[start:end]
        if piece in rendered.words:
            ids = tokenizer.encode(rendered.words[piece])
            is_in = any(first <= start and end <= last for first, last in rendered.spans)
            yield ids, np.full(len(ids), is_in)
        else:
            ids, places = tokenizer.encode_offsets(piece, ())
            trained = _inside(places + start, rendered.spans)
            yield ids, trained & ~_touching(places + start, rendered.places)
