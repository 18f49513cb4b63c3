"""Reads what planning needs from this machine: prepared data, a model's config, host memory, calibration."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drumline.errors import DataError, PlanError
from drumline.plan.model import NO_SITE, SiteFacts, StartFacts
from drumline.plan.world import World
from drumline.recipe.model_section import Model
from drumline.recipe.schema import Recipe

if TYPE_CHECKING:
    from drumline.memory.calibration import Calibration


def read_world(recipe: Recipe, start: StartFacts | None = None, site: SiteFacts = NO_SITE) -> World:
    """Read what is cheap to read; nothing is downloaded or tokenised, and no factory is imported.

    `start`: of a run that has begun, what its plan says of `start_from`, whose checkpoint may be gone.
    `site`: of the cluster that is planned for.
    """
    facts: dict[str, Any] = {"problems": [], "notes": [], "site": site}
    try:
        facts.update(_prepared(recipe, facts["problems"]))
    except DataError as error:
        facts["problems"].append(str(error).replace(f"{Path.cwd()}/", ""))
    facts["model_config"] = model_config(recipe.model, facts["notes"])
    facts |= _weights(recipe.model, facts["notes"])
    if recipe.model.factory:
        from drumline.data.batchnorm import batchnorm_of

        facts["batchnorm"] = batchnorm_of(recipe.model.factory, recipe.project)
    if recipe.cluster.gpu == "cpu":
        facts["host_memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts["calibration"] = _calibration()
    facts["start"] = start
    if recipe.start_from and start is None:
        from drumline.session.start import read_parent

        facts["parent"] = read_parent(recipe.start_from)
    return World(**facts)


def _calibration() -> "Calibration | None":
    """Load the calibration table that DRUMLINE_CALIBRATION names; None if it is not set."""
    path = os.environ.get("DRUMLINE_CALIBRATION")
    if not path:
        return None
    from drumline.memory.calibration import from_plain
    from drumline.recipe import yaml12

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"DRUMLINE_CALIBRATION: {path}: {error.strerror}") from None
    return from_plain(yaml12.parse(text), path)


def _prepared(recipe: Recipe, problems: list[str]) -> dict[str, Any]:
    """What is known of the prepared data, if there are any; what they lost is added to `problems`."""
    from drumline.data.cache import cache_folder

    folder = cache_folder(recipe.data, recipe.project)
    if not folder.is_dir():
        return {}
    from drumline.data.dataset_manifest import read_dataset_manifest

    manifest = read_dataset_manifest(folder)
    if manifest is None:
        return {}
    if manifest.truncated:
        problems.append(
            f"data: {manifest.truncated:,} of the prepared rows are cut at sequence_length "
            f"{manifest.sequence_length}, so what stands behind it is not trained"
        )
    if manifest.dropped:
        problems.append(
            f"data: {manifest.dropped:,} prepared rows have no target within sequence_length "
            f"{manifest.sequence_length}, and are not trained"
        )
    if manifest.skipped:
        problems.append(f"data: {manifest.skipped:,} bad rows skipped; {manifest.first_problem}")
    return {
        "samples": manifest.samples,
        "mixture": manifest.mixture or None,
        "mixture_lengths": manifest.mixture_lengths,
        "classes": manifest.classes,
        "sequences": manifest.sequences,
        "validation_samples": manifest.validation_samples,
        "row_tokens": manifest.row_tokens,
        "row_lengths": manifest.lengths,
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "cache": str(folder),
    }


def _weights(model: Model, notes: list[str]) -> dict[str, Any]:
    """Shapes of a pretrained model's tensors and bytes of its files; nothing where none are at hand."""
    if not (model.path or model.name):
        return {}
    from drumline.architectures.weight_files import headers_in

    if model.path:
        found = headers_in(Path(model.path))
        if found is None:
            notes.append(f"model.path: {model.path} holds no weights")
        return _facts_of_weights(found or {})
    from drumline.architectures.hub import cached_folder, is_cached

    assert model.name
    folder = cached_folder(model.name, model.revision)
    found = headers_in(folder) if folder and is_cached(model.name, model.revision) else None
    return _facts_of_weights(found or {})


def _facts_of_weights(headers: "dict[Path, dict[str, tuple[int, ...]]]") -> dict[str, Any]:
    if not headers:
        return {}
    shapes = {name: shape for held in headers.values() for name, shape in held.items()}
    return {"weights": shapes, "weights_bytes": sum(file.stat().st_size for file in headers)}


def model_config(model: Model, notes: list[str]) -> dict[str, Any] | None:
    """Read config.json of a model folder, or of a hub model from the local cache; None for other sources.

    A hub model that is not there has the published config, if it is a known one, which is added to
    `notes`; else None.
    """
    if model.source in ("config", "factory"):
        return None
    if model.source == "folder":
        assert model.path
        file = Path(model.path) / "config.json"
        if not file.is_file():
            raise PlanError(f"model.path: {model.path} has no config.json")
        return _read_config(file)
    from drumline.architectures.hub import cached_folder

    assert model.name
    folder = cached_folder(model.name, model.revision)
    if folder:
        return _read_config(folder / "config.json")
    from drumline.architectures.known_models import known_config

    known = known_config(model.name)
    if known:
        notes.append(
            f"model.name: the config of {model.name} is not in the local cache; "
            "planned with the published one"
        )
    return known


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except ValueError as error:
        raise PlanError(f"{file}: not JSON: {error}") from None
