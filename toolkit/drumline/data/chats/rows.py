"""Chats as token ids, with the tokens that are trained: those of what the assistant says.

A text is tokenised as a whole, and a token counts if all of its letters are the assistant's. Where a token
would have letters of both sides, the text is tokenised in pieces, as it is when the model answers. Words of
a message that look like a special token, such as <|im_end|>, are tokenised as text.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.chats.anchors import Span
from drumline.data.chats.messages import Chat, ChatFormat, chat_of
from drumline.data.chats.template import ChatTemplate, find_template
from drumline.data.tasks.base import Row
from drumline.data.tokenizers import Request, Tokenizer, Tokens
from drumline.recipe.data_section import Data

_PRIVATE = 0xE100
"""First of the letters that stand for words like a special token while a template is rendered."""


@dataclass(frozen=True)
class Rendered:
    """A chat's text; `spans`: the letters that are trained; `words`: what private letters of the text are."""

    text: str
    spans: list[Span]
    words: dict[str, str]

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

    def __init__(self, form: ChatFormat, data: Data, tokenizer: Tokenizer) -> None:
        self.form, self._data = form, data
        facts = tokenizer.chat
        self._template: ChatTemplate = find_template(
            data.chat_template, facts.template, {**facts.variables, **data.chat_template_options}
        )
        self._specials = () if data.special_tokens_in_text else tuple(filter(None, facts.specials))

    def render(self, row: Row) -> Rendered:
        """The text of a row; DataError where its chat is wrong, or what is trained cannot be told."""
        chat = chat_of(row, self.form, self._data)
        chat, words = self._guarded(self._last_only(chat))
        text, spans = self._template.text_of(chat)
        if self._data.train_on == "all":
            return Rendered(text, [(0, len(text))], words)
        turns = [n for n, one in enumerate(chat.messages) if one["role"] == "assistant"]
        kept = [span for n, span in zip(turns, spans, strict=True) if chat.trained[n]]
        return Rendered(text, kept, words)

    def tokens(self, rendered: Rendered, tokenizer: Tokenizer) -> tuple[Tokens, NDArray[np.bool_]]:
        """Token ids, and which of them are trained, bool [n]."""
        if not rendered.words:
            ids, places = tokenizer.encode_offsets(rendered.text, rendered.bounds)
            if not _crosses(places, rendered.bounds):
                return ids, _inside(places, rendered.spans)
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
        return Chat(chat.messages, chat.tools, trained)

    def _guarded(self, chat: Chat) -> tuple[Chat, dict[str, str]]:
        """The chat with a private letter for every word in it that looks like a special token."""
        words: dict[str, str] = {}

        def guard(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: guard(item) for key, item in value.items()}
            if isinstance(value, list):
                return [guard(item) for item in value]
            if isinstance(value, str):
                for special in self._specials:
                    if special in value:
                        letter = chr(_PRIVATE + len(words))
                        words[letter] = special
                        value = value.replace(special, letter)
            return value

        messages = [{**guard(one), "role": one["role"]} for one in chat.messages]
        return Chat(messages, guard(chat.tools), chat.trained), words


def _inside(places: NDArray[np.int64], spans: list[Span]) -> NDArray[np.bool_]:
    """Which tokens lie wholly within one of the spans, and have a letter."""
    found = np.zeros(len(places), dtype=bool)
    for start, end in spans:
        found |= (places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
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
            yield ids, _inside(places + start, rendered.spans)
