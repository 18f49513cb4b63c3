"""Configs of models on the hub that are known by name, for plans where config.json is not at hand. Pure."""

from functools import cache
from pathlib import Path
from typing import Any

from drumline.recipe import yaml12

_MIRRORS = ("NousResearch", "unsloth")
"""Publishers of copies of others' models, unchanged, under the same names."""


def known_config(name: str) -> dict[str, Any] | None:
    """The config of a model on the hub as far as memory depends on it; None if the table lacks the name."""
    rows = known_models()
    found = rows.get(name) or next((r for r in rows.values() if name in r.get("also", [])), None)
    publisher, _, base = name.partition("/")
    if found is None and publisher in _MIRRORS:
        found = next((r for key, r in rows.items() if _has(key, r, base)), None)
    return None if found is None else {"model_type": found["type"], **found["config"]}


def _has(key: str, row: dict[str, Any], base: str) -> bool:
    """Whether a row is that of a model of this name, whoever published it."""
    return base in (name.partition("/")[2] for name in (key, *row.get("also", [])))


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """The rows of known_models.yaml by name: type, config, parameters, classes and other names (`also`)."""
    text = (Path(__file__).parent / "known_models.yaml").read_text(encoding="utf-8")
    return yaml12.parse(text)  # type: ignore[no-any-return]
