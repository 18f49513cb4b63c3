"""Text for people: output that never raises, and texts without control characters."""

import io
import os
from collections.abc import Callable
from typing import Any


def printable(text: str) -> str:
    """The text with control characters, such as a terminal's escape sequences, shown instead of sent."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def _escaped(letter: str) -> str:
    """A character as Python would write it; a byte of a name that is not UTF-8 in hexadecimal."""
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "backslashreplace").decode()


def printable_in(value: Any) -> Any:
    """Plain data with every text made `printable`."""
    if isinstance(value, dict):
        return {key: printable_in(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable_in(item) for item in value]
    return printable(value) if isinstance(value, str) else value


_ASCII_SIGNS = str.maketrans({
    "×": "x", "÷": "/", "→": "->", "…": "...", "·": "-", "—": "-", "–": "-", "−": "-", "≤": "<=", "≥": ">=",
    "µ": "u", "‖": "|", "Σ": "sum", "█": "#", "━": "=", "╸": "=", "╺": "-",
})  # fmt: skip
"""What signs of drumline's own messages become where the terminal cannot show them."""


class ForgivingOutput(io.TextIOBase):
    """Line-buffered text output to a file descriptor that never raises.

    A closed pipe (`| head`), a closed terminal or a full disk must not end a training: text that cannot be
    written is dropped, and the first error is kept in `failed_with`. Characters that `encoding` lacks become
    similar ASCII signs or question marks. `hide` is applied to all text, to take secrets out of it.
    """

    def __init__(
        self,
        descriptor: int,
        encoding: str = "utf-8",
        hide: Callable[[str], str] = lambda text: text,
    ) -> None:
        self._descriptor, self._encoding, self._hide = descriptor, encoding, hide
        self._line = ""
        self.failed_with: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding, by which other libraries choose what to draw."""
        return self._encoding

    def write(self, text: str) -> int:
        """Write whole lines, and keep the rest until the line or the program ends."""
        lines, newline, rest = (self._line + text).rpartition("\n")
        self._line = rest
        self._send(lines + newline)
        return len(text)

    def flush(self) -> None:
        """Write a line that has not ended yet."""
        rest, self._line = self._line, ""
        self._send(rest)

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def _send(self, text: str) -> None:
        raw = self._encoded(self._hide(text)) if text else b""
        try:
            while raw:
                raw = raw[os.write(self._descriptor, raw) :]
        except OSError as error:
            self.failed_with = self.failed_with or error

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode(self._encoding)
        except UnicodeEncodeError:
            return text.translate(_ASCII_SIGNS).encode(self._encoding, errors="replace")
