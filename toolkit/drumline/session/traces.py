"""Keeps traces in the cache, so that the next plan of the same step needs neither torch nor another trace."""

import dataclasses
import hashlib
import json
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

from drumline import __version__
from drumline.data.cache import cache_root
from drumline.files import read_bytes, write_durably
from drumline.memory.recording import Traced
from drumline.plan.model import Plan
from drumline.runs.code import factory_hashes
from drumline.session.row_lengths import manifest_of_run
from drumline.session.world import model_config

TRACE_VERSION = 3
"""To raise when a trace of the same step would hold something else."""

_OF_THE_STEP = ("model", "strategy", "precision", "optimizer", "loss", "objective", "evaluation")
_OF_THE_ROWS = (
    "task", "task_factory", "task_options", "sequence_length", "target_length", "packing", "source",
    "factory", "options", "image", "audio",
)  # fmt: skip
_RATES = ("lr", "betas", "eps", "lr_scaling")
"""Keys of the recipe and of its `data` on which a step's allocations depend; the optimizer's that do not."""
_LARGEST = 1 << 30


def kept_trace(plan: Plan) -> Traced | None:
    """The trace of this step that was kept, or None."""
    try:
        raw = zlib.decompressobj().decompress(read_bytes(_file(plan)), _LARGEST)
        plain = json.loads(raw)
        events = plain.pop("events")
        return Traced(**plain, events=[tuple(event) for event in events])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, zlib.error):
        return None  # there is none, or it is no use


def keep_trace(plan: Plan, traced: Traced) -> None:
    """Keep a trace for later plans of the same step."""
    file = _file(plan)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, zlib.compress(json.dumps(dataclasses.asdict(traced)).encode()))


def _file(plan: Plan) -> Path:
    """Where the trace of this step is kept, by a hash of all that it depends on."""
    recipe = plan.recipe.model_dump(by_alias=True, mode="json")
    manifest = manifest_of_run(plan)
    for name in _RATES:
        recipe["optimizer"].pop(name)
    rows: Any = manifest and [manifest.row_tokens, manifest.feature_shape, manifest.classes]
    if manifest and plan.recipe.data.is_chat_with_images:  # of which the largest is traced
        rows.append(manifest.fingerprint)
    depends = {
        "version": TRACE_VERSION,
        "step": {name: recipe[name] for name in _OF_THE_STEP},
        "data": {name: recipe["data"][name] for name in _OF_THE_ROWS},
        "batch": [plan.batch.per_device, plan.batch.accumulation > 1],
        "launcher": plan.recipe.launch.launcher,
        "mesh": dataclasses.asdict(plan.mesh),
        "rows": rows,
        "config": model_config(plan.recipe.model, []),
        "code": factory_hashes(plan.recipe),
        "libraries": [__version__, _version("torch"), _version("transformers")],
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return cache_root() / "traces" / digest[:32]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
