"""How many rows local files hold and about how long they are, without a tokenizer."""

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drumline.data.files import format_of, size_of
from drumline.data.readers import Reading, read_file

_MOST_ROWS = 20_000
_BYTES_PER_TOKEN = 3
"""Bytes of UTF-8 that make a token: 4 are usual for English, 3 for code and for most other writing."""
_TOKENS_AROUND_A_TEXT = 8
"""Tokens that a chat template puts around a message, about."""


@dataclass(frozen=True)
class RowsAtHand:
    """The `first` row, about how many there are (`count`), and about how many `tokens` each has, sorted."""

    first: Mapping[str, Any]
    count: int
    tokens: list[int]

    def tokens_of_all(self) -> int:
        """Estimated tokens of all rows together."""
        return round(sum(self.tokens) / len(self.tokens) * self.count)

    def longest_but(self, share: float) -> int:
        """Estimated tokens that all rows but this share of them do not exceed."""
        return self.tokens[min(len(self.tokens) - 1, int((1 - share) * len(self.tokens)))]


def look_at(data: str) -> RowsAtHand | None:
    """What the files of a path, a pattern or a folder hold; None where there is no row.

    Of many rows the first 20,000 are read, and how many there are follows from the share of the bytes.
    """
    path = Path(data).expanduser()
    found = path.glob("*") if path.is_dir() else map(Path, glob.glob(str(path)))
    known = [file for file in sorted(found) if file.is_file() and format_of(file)]
    reading = Reading(sum(size_of(file) or 0 for file in known))
    first: Mapping[str, Any] | None = None
    tokens: list[int] = []
    share = 1.0
    for row in (row for file in known for row in read_file(file, reading)):
        if first is None:
            first = row.fields
        tokens.append(_tokens_of(row.fields))
        if len(tokens) == _MOST_ROWS:
            share = reading.share()
            break
    if first is None:
        return None
    count = round(len(tokens) / share) if share else len(tokens)
    return RowsAtHand(first, count, sorted(tokens))


def _tokens_of(fields: Mapping[str, Any]) -> int:
    texts = list(_texts(fields))
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return size // _BYTES_PER_TOKEN + _TOKENS_AROUND_A_TEXT * len(texts)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
