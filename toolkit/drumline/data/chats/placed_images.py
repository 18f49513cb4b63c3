"""Where the images of a chat stand: named by its messages, or marked in their texts."""

import re
from dataclasses import replace

from drumline.data.chats.messages import OWN_IMAGES, PLACE, Chat, Message
from drumline.data.tasks.base import Row, field_of
from drumline.errors import DataError
from drumline.recipe.data_section import Data

Slot = bytes | int | None
"""An image of a message: its bytes, its number among the row's, or the next of these."""

_REPRS = ("[{'type':", "{'type': 'text'")
"""How a template shows that it took a list of parts for a text."""
_PLACES = re.compile(rf"(<image>|{PLACE})")
"""An image, or how public data write its place."""
_FIRST_LINES = re.compile(r"^\s*(?:<image>\n?)+")
_LAST_LINES = re.compile(r"(?:\n?<image>)+\s*$")
"""Images at the beginning or the end of a message, each of which may have a line of its own."""


def with_images(chat: Chat, of_row: list[bytes]) -> Chat:
    """The chat with its images: those of its messages, and of the row where a message says <image>.

    Images of a row whose messages have no place for any stand before the first text of the user, as
    everybody's processors of chats have it. DataError where there are more places than images, or fewer.
    """
    slots: list[list[Slot]] = []
    for number, message in enumerate(chat.messages, start=1):
        own: list[Slot] = message.pop(OWN_IMAGES, [])
        if message["role"] == "assistant" and own:
            raise DataError(f"message {number} (assistant): an image, and models say texts only")
        if message["content"].count(PLACE) != len(own):
            raise DataError(
                f"message {number}: {PLACE!a}, a private letter that stands for an image"
            )
        slots.append(own)
        if of_row and message["role"] != "assistant":
            message["content"], slots[-1] = _with_marked(message["content"], own)
    free = sum(one is None for own in slots for one in own)
    numbered = {one for own in slots for one in own if isinstance(one, int)}
    if numbered:
        return _by_number(chat, slots, of_row, free)
    if of_row and not free:
        first = next(n for n, one in enumerate(chat.messages) if one["role"] == "user")
        chat.messages[first]["content"] = PLACE * len(of_row) + chat.messages[first]["content"]
        slots[first] = [*(None for _ in of_row), *slots[first]]
    elif free != len(of_row):
        raise DataError(
            f"{len(of_row)} images, and {free} places for them in the messages (<image>, or a part of type "
            "image)"
        )
    given = iter(of_row)
    return replace(
        chat,
        images=tuple(
            one if isinstance(one, bytes) else next(given) for own in slots for one in own
        ),
    )


def _by_number(chat: Chat, slots: list[list[Slot]], of_row: list[bytes], free: int) -> Chat:
    """The chat whose parts say by `index` which image of the row they are; DataError unless all are used."""
    whole = [one for own in slots for one in own]
    used = {one for one in whole if isinstance(one, int)}
    if free or used != set(range(len(of_row))):
        raise DataError(
            f"{len(of_row)} images, and parts with the index {', '.join(map(str, sorted(used)))}"
            + (f" beside {free} without one" if free else "")
        )
    return replace(
        chat,
        images=tuple(
            of_row[one] if isinstance(one, int) else one for one in whole if one is not None
        ),
    )


def _with_marked(text: str, own: list[Slot]) -> tuple[str, list[Slot]]:
    """A message's text with a place for every <image> in it, and its images, None for those."""
    for lines in (_FIRST_LINES, _LAST_LINES):
        text = lines.sub(lambda found: found[0].replace("\n", ""), text)
    waiting, slots, pieces = iter(own), [], _PLACES.split(text)
    for number in range(1, len(pieces), 2):  # what the pattern found stands between the others
        slots.append(next(waiting) if pieces[number] == PLACE else None)
        pieces[number] = PLACE
    return "".join(pieces), slots


def in_parts(chat: Chat, all_of_them: bool) -> Chat:
    """The chat with messages of parts, texts and images; without an image only if `all_of_them`."""
    messages = [
        one
        if PLACE not in one["content"] and not all_of_them
        else {
            **one,
            "content": [
                {"type": "image"} if piece == PLACE else {"type": "text", "text": piece}
                for piece in re.split(f"({PLACE})", one["content"])
                if piece
            ],
        }
        for one in chat.messages
    ]
    return replace(chat, messages=messages)


def refuse_lost_words(chat: Chat, text: str) -> None:
    """DataError where the template did not write what a message says, or wrote its parts as Python does."""
    said = [piece.strip() for one in chat.messages for piece in one["content"].split(PLACE)]
    lost = next((piece for piece in said if piece and piece not in text), None)
    is_repr = any(mark in text and not any(mark in piece for piece in said) for mark in _REPRS)
    if lost is not None or is_repr:
        what = f"loses {lost[:40]!r}" if lost is not None else "prints the parts of a message"
        raise DataError(
            f"the chat template {what}. Nearest: the processor's own data.chat_template"
        )


def images_of(row: Row, messages: list[Message], data: Data) -> list[bytes]:
    """The images in the row's column; DataError where a message says <image>, and there is no such column."""
    is_there, value = False, None
    if data.image_field is not None:
        is_there, value = field_of(row, data.image_field)
    marked = [n for n, one in enumerate(messages, start=1) if "<image>" in one["content"]]
    if marked and not is_there:
        column = "names no column" if data.image_field is None else f"is {data.image_field!r}"
        raise DataError(
            f"message {marked[0]}: <image>, data.image_field {column}, and this row has "
            f"{', '.join(map(str, row))}. Nearest: the column with its images, an empty list where <image> "
            "is text"
        )
    return list(value or ())
