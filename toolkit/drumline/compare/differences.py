"""Differences between two records by name: recipe keys, inputs, code and environment. Pure."""

import hashlib
import json
import re
from typing import Any

from drumline.runs.environment import THAT_TRAIN

Pair = tuple[Any, Any]

_NOT_COMPARED = ("recipe", "description", "schema", "project", "logging")


def recipe_differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Pair]:
    """Differing values of two plain recipes, by dotted key."""
    ours, theirs = _flat(a), _flat(b)
    return {
        key: (ours.get(key), theirs.get(key))
        for key in [*ours, *(k for k in theirs if k not in ours)]
        if ours.get(key) != theirs.get(key) and key.split(".")[0] not in _NOT_COMPARED
    }


def input_differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Pair]:
    """Differing fingerprints of data, tokenizer and model."""
    places = {
        "data": ("data", "fingerprint"),
        "tokenizer": ("data", "tokenizer"),
        "model": ("model", "fingerprint"),
    }
    return _differing({name: (_at(a, *path), _at(b, *path)) for name, path in places.items()})


def code_differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Pair]:
    """Differences in commit, content of changed files, factory files, and drumline's own source."""
    pairs = {
        "commit": (_at(a, "code", "commit"), _at(b, "code", "commit")),
        "drumline's source": (a.get("drumline_sha256"), b.get("drumline_sha256")),
    }
    ours, theirs = _code_files(a), _code_files(b)
    for name in sorted({*ours, *theirs}):
        pairs[name] = (ours.get(name, "absent"), theirs.get(name, "absent"))
    return _differing(pairs)


def environment_differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Pair]:
    """Differences in packages that train, GPU, driver, CUDA, NCCL, CPU, platform, container and variables."""
    pairs = {
        f"version of {name}": (_at(a, "versions", name), _at(b, "versions", name))
        for name in THAT_TRAIN
    }
    pairs["processor"] = (_at(a, "hardware", "cpu"), _at(b, "hardware", "cpu"))
    pairs["gpus"] = (_gpus(a), _gpus(b))
    pairs["platform"] = (_at(a, "hardware", "platform"), _at(b, "hardware", "platform"))
    pairs["container"] = (a.get("container"), b.get("container"))
    for name in ("device", "cuda", "nccl", "cudnn", "threads"):
        pairs[name] = (_device(a, name), _device(b, name))
    ours, theirs = _variables(a), _variables(b)
    if ours is not None and theirs is not None:
        for name in sorted({*ours, *theirs}):
            pairs[f"variable {name}"] = (ours.get(name, "unset"), theirs.get(name, "unset"))
    found = _differing(pairs)
    others = _other_versions(a, b)
    if others:
        found[f"{others} other packages"] = ("", "")
    return found


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found


def _differing(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """Keep the pairs where both values are known and differ."""
    return {k: (a, b) for k, (a, b) in pairs.items() if a is not None and b is not None and a != b}


def _at(record: dict[str, Any], *path: str) -> Any:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _code_files(record: dict[str, Any]) -> dict[str, str]:
    """Changed, untracked and factory files, each with 12 hex digits of the SHA-256 of its diff or content."""
    code = record.get("code") or {}
    found = {}
    for part in re.split(r"^(?=diff --git )", code.get("diff") or "", flags=re.MULTILINE):
        if part:
            found[f"diff of {part.partition(chr(10))[0].rpartition(' b/')[2]}"] = _short(part)
    for name, text in (code.get("untracked") or {}).items():
        found[f"untracked {name}"] = _short(text)
    for name, digest in (code.get("factories") or {}).items():
        found[f"file {name}"] = digest[:12]
    return found


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _gpus(record: dict[str, Any]) -> Any:
    gpus = _at(record, "hardware", "gpus")
    if gpus is None:
        return None
    return ", ".join(sorted({f"{gpu['name']} (driver {gpu['driver']})" for gpu in gpus})) or "none"


def _device(record: dict[str, Any], name: str) -> Any:
    """A device fact of the last attempt that recorded its devices."""
    told = [entry["devices"] for entry in record.get("attempts") or [] if entry.get("devices")]
    return told[-1][0].get(name) if told else None


def _variables(record: dict[str, Any]) -> dict[str, str] | None:
    """Environment variables of the last attempt; None in a record that does not hold them."""
    told = [
        entry["environment"] for entry in record.get("attempts") or [] if "environment" in entry
    ]
    return told[-1] if told else None


def _other_versions(a: dict[str, Any], b: dict[str, Any]) -> int:
    ours, theirs = a.get("versions") or {}, b.get("versions") or {}
    if len(ours) <= len(THAT_TRAIN) or len(theirs) <= len(THAT_TRAIN):
        return 0
    names = {*ours, *theirs} - set(THAT_TRAIN)
    return sum(ours.get(name) != theirs.get(name) for name in names)


def difference_lines(found: dict[str, Pair]) -> list[str]:
    """Format each difference as a line `name  a -> b`."""
    width = max(map(len, found), default=0)
    return [
        f"{name:<{width}}  {_shown(a)} -> {_shown(b)}" if (a, b) != ("", "") else f"{name} differ"
        for name, (a, b) in found.items()
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
