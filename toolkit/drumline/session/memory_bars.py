"""A rank's memory in each phase of a step as bars of text, against what the device has."""

import sys

from drumline.plan.model import MemoryFacts
from drumline.units import format_bytes

_WIDTH = 32
_FULL, _PARTS = "█", " ▏▎▍▌▋▊▉"


def memory_bars(memory: MemoryFacts) -> list[str]:
    """A line for each phase: its name, a bar of its allocated bytes, the bytes; the width is the device.

    Where the device's memory is not known, the width is that of the largest phase.
    """
    phases = {name: size for name, size in memory.phases.items() if size}
    whole = max([memory.capacity or 0, *phases.values()])
    if len(phases) < 2:
        return []
    width = max(len(name) for name in phases)
    return [
        f"{name:<{width}} {_bar(size / whole)} {format_bytes(size):>9}"
        f"{'  peak' if name == memory.peak_phase else ''}"
        for name, size in phases.items()
    ]


def _bar(share: float) -> str:
    eighths = round(8 * _WIDTH * min(1.0, share))
    if not _can_show(_FULL + _PARTS):
        return f"{'#' * round(eighths / 8):<{_WIDTH}}|"
    bar = _FULL * (eighths // 8) + _PARTS[eighths % 8].strip()
    return f"{bar:<{_WIDTH}}|"


def _can_show(text: str) -> bool:
    """Whether standard output has these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
