"""What went in: the data's, the tokenizer's and the model's fingerprints, by content and never by path."""

import hashlib
import json
from pathlib import Path
from typing import Any

from drumline.data.dataset_manifest import read_dataset_manifest
from drumline.plan.model import Plan
from drumline.recipe.schema import Model

_CHUNK = 1 << 22


def data_entry(plan: Plan) -> dict[str, Any]:
    """Fingerprint of the prepared rows, of the tokenizer, and how many samples there are."""
    manifest = read_dataset_manifest(Path(plan.data.cache)) if plan.data.cache else None
    return {
        "fingerprint": plan.data.fingerprint,
        "tokenizer": manifest.tokenizer if manifest else None,
        "samples": plan.steps.samples,
    }


def model_fingerprint(model: Model) -> str:
    """SHA-256 of the config, or of a folder's config and weights; a hub model's revision.

    A factory's is that of its `config`; its file is in the record's `code.factories`.
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
    """The commit of the hub's snapshot in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    assert model.name
    found = try_to_load_from_cache(model.name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None
