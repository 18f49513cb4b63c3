"""What a start finds changed since the run was recorded: packages, drumline itself, the project's files."""

from typing import Any

from drumline.recipe.schema import Recipe
from drumline.runs.code import factory_hashes, package_sha256
from drumline.runs.environment import THAT_TRAIN, read_versions


def changed_since(record: dict[str, Any], recipe: Recipe) -> dict[str, list[Any]]:
    """Name -> [recorded, now] of everything that differs and could change the training; data are not in it.

    Data are compared by their fingerprint, and refused where they differ.
    """
    found: dict[str, list[Any]] = {}
    before, now = record.get("versions") or {}, read_versions()
    for name in THAT_TRAIN:
        if before and before.get(name) != now.get(name):
            found[f"version of {name}"] = [before.get(name), now.get(name)]
    source = record.get("drumline_sha256")
    if source and source != (ours := package_sha256()):
        found["drumline's source"] = [source[:12], ours[:12]]
    files = (record.get("code") or {}).get("factories") or {}
    hashes = factory_hashes(recipe)
    for name in sorted({*files, *hashes}):
        if files.get(name) != hashes.get(name):
            found[f"file {name}"] = [
                (files.get(name) or "absent")[:12],
                (hashes.get(name) or "absent")[:12],
            ]
    return found


def change_words(changes: dict[str, list[Any]]) -> str:
    """The changes in one line."""
    return "; ".join(f"{name}: {before} -> {now}" for name, (before, now) in changes.items())
