"""The card of a prepared folder: what it holds, readable without numpy or torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

CARD_VERSION = 3


@dataclass(frozen=True)
class Card:
    """What a prepared folder holds; `fingerprint` and `tokenizer` depend on content alone, never on paths."""

    version: int
    task: str
    fingerprint: str
    samples: int
    validation_samples: int
    sequence_length: int | None
    tokenizer: str | None
    token_dtype: str | None
    vocabulary: int | None
    feature_shape: list[int] | None
    classes: int | None
    label_tokens: int
    truncated: int
    dropped: int
    files: dict[str, int]

    def write(self, folder: Path) -> None:
        """Write card.json, the last file of a prepared folder."""
        (folder / "card.json").write_text(json.dumps(asdict(self), indent=2))


def read_card(folder: Path) -> Card | None:
    """The card of a prepared folder; None where there is none, or where its files are damaged."""
    try:
        raw = json.loads((folder / "card.json").read_text())
    except (OSError, ValueError):
        return None
    if raw.get("version") != CARD_VERSION:
        return None
    card = Card(**raw)
    return card if card.files == sizes(folder) else None


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each array of a prepared folder: what is missing or cut short is seen by it."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.glob("*/*.bin")}
