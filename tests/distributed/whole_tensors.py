"""Puts the tensors of a checkpoint together from its ranks' parts, by indexing and not as the loader does."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from drumline.checkpoint.shards import read_entries


def whole_tensors(checkpoint: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint whose name begins with the prefix, in its global shape."""
    whole: dict[str, torch.Tensor] = {}
    for path in checkpoint.glob("rank-*.json"):
        rank = int(path.stem.removeprefix("rank-"))
        entries = read_entries(checkpoint, rank)
        stored: dict[str, torch.Tensor] = {}
        for file in {entry["file"] for entry in entries.values()}:
            stored |= load_file(checkpoint / file)
        for name, entry in entries.items():
            if not name.startswith(prefix):
                continue
            values = stored[name]
            target = whole.setdefault(name, torch.empty(entry["shape"], dtype=values.dtype))
            at = 0
            for box in entry["boxes"]:
                cuts = tuple(slice(o, o + n) for o, n in zip(*box, strict=True))
                target[cuts] = values[at : at + box.volume].view(box.sizes)
                at += box.volume
    return whole
