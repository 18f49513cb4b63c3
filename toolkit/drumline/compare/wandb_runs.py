"""Reads runs from W&B: offline `.wandb` files without network, `wandb:ENTITY/PROJECT/ID` through its API.

A `.wandb` file is a LevelDB log (a header of 7 bytes, blocks of 32 KiB, records of CRC, length, type) of
protobuf records. The client's reader was removed in 0.31, so this module reads the framing and parses the
records with the client's protobuf classes. A truncated file is read up to its last valid record.
"""

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drumline.compare.logged import Logged, split_lines
from drumline.errors import LaunchError, RunFolderError
from drumline.files import parse_json, read_bytes
from drumline.metrics_file import Kind, with_kind

_LARGEST = 4 << 30
_MAGIC = b":W&B"
_FILE_HEADER = 7
_BLOCK = 1 << 15
_RECORD_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_STEP_DEFAULTS = {"loss": None, "grad_norm": None}


def read_offline(path: Path) -> Logged:
    """Read one W&B run from a `.wandb` file, or from a folder with one file per start."""
    files = _files_of(path)
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for file in files:
        _read_file(file, config, summary, history)
    return _logged(str(path), config, summary, history)


def read_online(where: str) -> Logged:
    """Read `wandb:ENTITY/PROJECT/ID` through W&B's public API with this machine's login."""
    name = where.removeprefix("wandb:")
    if name.count("/") != 2:
        raise RunFolderError(f"{where}: expected wandb:ENTITY/PROJECT/ID")
    try:
        import wandb
    except ImportError:
        raise LaunchError(
            f"{where}: wandb is not installed. Nearest: pip install 'drumline[wandb]'"
        ) from None
    try:
        run = wandb.Api().run(name)
        history = list(run.scan_history())
    except (wandb.Error, ValueError) as error:
        raise RunFolderError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    return _logged(where, dict(run.config), dict(run.summary), history)


def _logged(
    name: str, config: dict[str, Any], summary: dict[str, Any], history: list[dict[str, Any]]
) -> Logged:
    if not {"recipe", "plan", "record"} <= set(config):
        raise RunFolderError(f"{name}: this W&B run was not logged by drumline")
    record = {**config["record"], "recipe": config["recipe"], "plan": config["plan"]}
    record["weights"] = summary.get("weights")
    lines = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]
    lines = [with_kind(row) for row in lines if "step" in row]
    lines = [_STEP_DEFAULTS | row if row["kind"] == Kind.STEP else row for row in lines]
    steps, evaluations, events = split_lines(lines)
    return Logged(name, record, steps, evaluations=evaluations, events=events)


def _files_of(path: Path) -> list[Path]:
    """All files of one W&B run, oldest start first."""
    if path.is_file():
        return sorted({path, *path.parent.parent.glob(f"*run-*/{path.name}")})
    found = sorted(path.rglob("run-*.wandb"))
    names = sorted({file.name for file in found})
    if len(names) > 1:
        raise RunFolderError(
            f"{path}: it holds several runs: {', '.join(names)}. Nearest: one of these files"
        )
    return found


def _read_file(
    path: Path, config: dict[str, Any], summary: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError:
        raise LaunchError(
            f"{path}: wandb is not installed. Nearest: pip install 'drumline[wandb]'"
        ) from None
    try:
        raw = read_bytes(path, _LARGEST, follow=True)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from None
    if raw[:4] != _MAGIC:
        raise RunFolderError(f"{path}: it is not a .wandb file")
    for data in _records(raw):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(data)
        except Exception:  # protobuf's DecodeError: what follows is damaged too
            return
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            items = record.run.config if kind == "run" else record.config
            config |= _values(items.update)
        elif kind == "summary":
            summary |= _values(record.summary.update)
        elif kind == "history":
            history.append(_values(record.history.item))


def _values(items: Any) -> dict[str, Any]:
    found = {}
    for item in items:
        with contextlib.suppress(ValueError):  # a value that is not JSON is left out
            found[item.key or ".".join(item.nested_key)] = parse_json(item.value_json)
    return found


def _records(raw: bytes) -> Iterator[bytes]:
    """Yield payloads up to the first that is truncated or has a wrong checksum."""
    at, parts = _FILE_HEADER, b""
    while at + _RECORD_HEADER <= len(raw):
        left = _BLOCK - at % _BLOCK
        if left < _RECORD_HEADER:
            at += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", raw, at)
        at += _RECORD_HEADER
        data = raw[at : at + length]
        at += length
        if (
            len(data) < length
            or kind not in (_FULL, _FIRST, _MIDDLE, _LAST)
            or crc != _crc(kind, data)
        ):
            return
        parts = data if kind in (_FULL, _FIRST) else parts + data
        if kind in (_FULL, _LAST):
            yield parts


def _crc(kind: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(bytes([kind]))) & 0xFFFFFFFF
