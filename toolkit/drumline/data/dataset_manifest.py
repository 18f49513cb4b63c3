"""The dataset manifest, which describes a prepared folder; readable without numpy or torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

MANIFEST_VERSION = 3
_FILE = "card.json"


@dataclass(frozen=True)
class DatasetManifest:
    """Describes a prepared folder; `fingerprint` and `tokenizer` depend on content only, not on paths.

    `arrays`: the dtype of each extra array that a custom task stores. `files`: bytes of each file.
    """

    task: str
    fingerprint: str
    samples: int
    validation_samples: int
    sequence_length: int | None
    tokenizer: str | None = None
    token_dtype: str | None = None
    vocabulary: int | None = None
    feature_shape: list[int] | None = None
    classes: int | None = None
    label_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    files: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, str] = field(default_factory=dict)
    version: int = MANIFEST_VERSION

    def write(self, folder: Path) -> None:
        """Write the manifest, the last file of a prepared folder."""
        (folder / _FILE).write_text(json.dumps(asdict(self), indent=2))


def read_dataset_manifest(folder: Path) -> DatasetManifest | None:
    """The manifest of a prepared folder; None if it is missing or outdated, or if file sizes differ."""
    try:
        raw = json.loads((folder / _FILE).read_text())
    except (OSError, ValueError):
        return None
    if raw.get("version") != MANIFEST_VERSION:
        return None
    manifest = DatasetManifest(**raw)
    return manifest if manifest.files == sizes(folder) else None


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each array file in a prepared folder; detects missing and truncated files."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.glob("*/*.bin")}
