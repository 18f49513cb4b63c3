"""The dataset manifest, which describes a prepared folder; readable without numpy or torch."""

import json
import os
import pwd
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from drumline.errors import DataError
from drumline.files import read_json
from drumline.recipe.data_section import ALONE

MANIFEST_VERSION = 3
MANIFEST_FILE = "card.json"


@dataclass(frozen=True)
class MaskFacts:
    """The id that masks a token, those that are never masked, and the ids around a document; None without."""

    mask: int | None
    specials: list[int]
    before: int | None
    after: int | None


@dataclass(frozen=True)
class DatasetManifest:
    """Describes a prepared folder; `fingerprint` and `tokenizer` depend on content only, not on paths.

    `rows`: as `fingerprint`, of the training rows alone; None in folders of before it was kept.

    `arrays`: the dtype of each extra array that a custom task stores. `files`: bytes of each file. `longest`:
    input tokens of the longest row, which no padded micro-batch is wider than; None if rows are packed, or
    collated by a custom task. `lengths`: input tokens of training rows at 0 %, 1 %, … 100 % of them, sorted,
    where they are padded. `style`: what the rows were recognised as. `evaluation`: rows of each evaluation
    set by its name; `validation_samples` is their sum. `mixture`: training rows of each source of a mixture
    by its label, in the order in which they lie; `mixture_lengths`: as `lengths`, of each. `sequences`: of
    tokens that a row holds. `class_names`: of classes by number. `masking`: of rows
    whose tokens are masked while they are read. `origin`: where the rows came from, for people.
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
    longest: int | None = None
    skipped: int = 0
    first_problem: str = ""
    files: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, int] = field(default_factory=dict)
    origin: str = ""
    style: str = ""
    lengths: list[int] | None = None
    mixture: dict[str, int] = field(default_factory=dict)
    mixture_lengths: list[list[int]] | None = None
    rows: str | None = None
    sequences: int = 1
    masking: MaskFacts | None = None
    class_names: list[str] | None = None
    version: int = MANIFEST_VERSION

    @property
    def evaluation_parts(self) -> dict[str, str]:
        """The parts that are evaluated, by the names of their sets."""
        if not self.evaluation:
            return {ALONE: "validation"} if self.validation_samples else {}
        return {name: part_of_set(name) for name in self.evaluation}

    @property
    def row_tokens(self) -> int | None:
        """Input tokens of the widest micro-batch: those of the longest row, or else `sequence_length`."""
        return self.longest or self.sequence_length

    def with_rows_of(self, tokens: int | None) -> "DatasetManifest":
        """The same for a run whose longest row has so many input tokens; None changes nothing."""
        return self if tokens is None or self.longest is None else replace(self, longest=tokens)

    def write(self, folder: Path) -> None:
        """Write the manifest, the last file of a prepared folder."""
        (folder / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


def read_dataset_manifest(folder: Path) -> DatasetManifest | None:
    """The manifest of a prepared folder; None if it is missing or outdated, or if file sizes differ.

    DataError if the folder is there and this user may not read it.
    """
    try:
        raw = read_json(folder / MANIFEST_FILE)
    except PermissionError:
        raise DataError(not_ours(folder)) from None
    except (OSError, ValueError):
        return None
    if not isinstance(raw, dict) or raw.get("version") != MANIFEST_VERSION:
        return None
    try:
        masking = raw.get("masking") and MaskFacts(**raw["masking"])
        manifest = DatasetManifest(**{**raw, "masking": masking})
    except TypeError:
        return None
    return manifest if manifest.files == sizes(folder) else None


def _parts_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except PermissionError:
        raise DataError(not_ours(folder)) from None
    except OSError:
        return []


def part_of_set(name: str) -> str:
    """The part of an evaluation set."""
    return f"evaluation-{name}"


def not_ours(folder: Path) -> str:
    """Say that prepared data belong to somebody else, and what to do."""
    import shlex  # here, since a dry run needs few modules

    status = folder.stat()
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = f"user {status.st_uid}"
    return (
        f"{folder}: prepared by {owner} with mode {stat.S_IMODE(status.st_mode):04o}, which this user cannot "
        f"use. Nearest: {owner} runs chmod -R a+rX {shlex.quote(str(folder))}, or another "
        "DRUMLINE_CACHE"
    )


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each array file in a prepared folder; detects missing and truncated files."""
    found: dict[str, int] = {}
    for part in _parts_in(folder):
        try:
            with os.scandir(folder / part) as entries:
                found |= {
                    f"{part}/{e.name}": e.stat().st_size for e in entries if e.name.endswith(".bin")
                }
        except PermissionError:
            raise DataError(not_ours(folder)) from None
        except OSError:
            continue
    return found
