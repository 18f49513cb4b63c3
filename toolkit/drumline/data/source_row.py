"""A row of a data source, with what drumline itself knows of it kept apart from the user's columns."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SourceRow:
    """The `fields` of a row by the user's names; `where` it stands, such as `a.jsonl, line 3`.

    `ends`: whether its document ends with it; false for a block of a longer text. `problem`: why it could
    not be read, where the rows after it still can. `media_bytes`: of images and recordings in its fields.
    """

    fields: dict[str, Any]
    where: str
    ends: bool = True
    problem: str = ""
    media_bytes: int = 0
