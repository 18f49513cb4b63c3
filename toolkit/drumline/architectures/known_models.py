"""Configs of models on the hub that are known by name, for plans where config.json is not at hand. Pure."""

from functools import cache
from pathlib import Path
from typing import Any

from drumline.recipe import yaml12


def known_config(name: str) -> dict[str, Any] | None:
    """The config of a model on the hub as far as memory depends on it; None if the table lacks the name."""
    rows = known_models()
    found = rows.get(name) or next((r for r in rows.values() if name in r.get("also", [])), None)
    return None if found is None else {"model_type": found["type"], **found["config"]}


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """The rows of known_models.yaml by name: type, config, parameters, classes and other names (`also`)."""
    text = (Path(__file__).parent / "known_models.yaml").read_text(encoding="utf-8")
    return yaml12.parse(text)  # type: ignore[no-any-return]
