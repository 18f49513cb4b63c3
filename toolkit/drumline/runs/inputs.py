"""Fingerprints of data, tokenizer and model, which do not depend on paths."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from drumline.architectures.hub import cached_folder
from drumline.data.dataset_manifest import read_dataset_manifest
from drumline.plan.model import Plan
from drumline.recipe.model_section import Model

_CHUNK = 1 << 22


def data_entry(plan: Plan) -> dict[str, Any]:
    """Fingerprints of the prepared rows and the tokenizer, and the number of samples."""
    manifest = read_dataset_manifest(Path(plan.data.cache)) if plan.data.cache else None
    return {
        "fingerprint": plan.data.fingerprint,
        "tokenizer": manifest.tokenizer if manifest else None,
        "samples": plan.steps.samples,
        "mixture": [dataclasses.asdict(own) for own in plan.data.mixture],
    }


def model_fingerprint(model: Model) -> str:
    """Fingerprint of the model's source.

    A folder: SHA-256 of its config and weights. A hub model: name@revision. Else SHA-256 of the names of
    architecture and factory and of the `config`; a factory's file is in the record's `code.factories`.
    """
    if model.source == "folder":
        assert model.path
        return _folder(Path(model.path))
    if model.source == "hub":
        return f"{model.name}@{_revision(model) or 'unknown'}"
    plain = {"architecture": model.architecture, "factory": model.factory, "config": model.config}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _revision(model: Model) -> str | None:
    """Commit of the hub snapshot in the local cache; None if it is not cached."""
    assert model.name
    folder = cached_folder(model.name, model.revision)
    return folder.name if folder else None
