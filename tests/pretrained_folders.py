"""Folders as transformers' save_pretrained writes them, and faults in their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
Change = Callable[[Weights], Weights]


def saved(
    folder: Path, kind: str, architecture: str, config: dict[str, Any], shard: str = "1GB"
) -> Path:
    """A model with random weights, the same ones each time; `kind`: the auto class of transformers.

    `shard`: the most of a file.
    """
    full = transformers.AutoConfig.for_model(architecture, **config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind).from_config(full)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def changed(folder: Path, change: Change) -> Path:
    """The folder with other weights in its file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def prefixed(prefix: str) -> Change:
    """Every name begins with this."""
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


def without(part: str) -> Change:
    """No name has this in it."""
    return lambda weights: {name: value for name, value in weights.items() if part not in name}
