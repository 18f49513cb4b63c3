"""Process identity that survives PID reuse, signals to such processes, and free ports."""

import contextlib
import functools
import os
import random
import re
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""A rank finishes the step, saves and exits. SIGHUP means that the terminal was closed."""
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
"""nohup ignores SIGHUP, and a shell SIGINT for background jobs; whoever started this process wants that."""
STACKS_SIGNAL = signal.SIGUSR2
"""A rank answers it by writing the stacks of all its threads to its log."""
_PORTS, _TRIES = range(20000, 65536), 100


def heeded(number: signal.Signals) -> bool:
    """Whether to handle a stop signal: not if it is one that this process was started to ignore."""
    return number not in _MAY_BE_IGNORED or signal.getsignal(number) is not signal.SIG_IGN


@dataclass(frozen=True)
class Process:
    """A process identified by PID, start time (clock ticks since boot) and host."""

    pid: int
    started: int
    host: str

    @classmethod
    def current(cls) -> Self:
        """This process."""
        return cls(os.getpid(), _started(os.getpid()) or 0, this_host())

    @classmethod
    def of(cls, pid: int) -> Self:
        """A process of this host that this one has started and not waited for."""
        return cls(pid, _started(pid) or 0, this_host())

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse what `str` wrote; None for any other text."""
        parts = text.split()
        if len(parts) != 3 or not all(re.fullmatch(r"[0-9]{1,19}", part) for part in parts[:2]):
            return None
        return cls(int(parts[0]), int(parts[1]), parts[2])

    def __str__(self) -> str:
        return f"{self.pid} {self.started} {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether it belongs to this host; only then can it be inspected and signalled."""
        return self.host == this_host()

    @property
    def is_alive(self) -> bool:
        """Whether it runs on this host; a zombie does not."""
        return self.is_here and _started(self.pid) == self.started

    def send(self, number: signal.Signals | int) -> None:
        """Send a signal to this process, but not to another one that reuses its PID."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


SOURCE_ROOTS = tuple(
    root
    for name in ("toolkit", "launchers")
    if (root := Path(__file__).resolve().parents[2] / name).is_dir()
)
"""In a checkout, the folders that hold `drumline` and `drumline_launchers`; empty if they are installed."""


def python_path(environment: Mapping[str, str]) -> str:
    """PYTHONPATH for a child process, so that it imports the same drumline as this one."""
    before = environment.get("PYTHONPATH")
    return os.pathsep.join([*map(str, SOURCE_ROOTS), *([before] if before else [])])


def free_port() -> int:
    """Find a free TCP port of this host, outside the ephemeral range if possible.

    Linux assigns ephemeral ports to sockets that ask for no particular one, such as srun's, so one of those
    could be taken in the seconds until the ranks bind it.
    """
    given = _ephemeral_ports()
    others = [port for port in _PORTS if port not in given]
    for port in random.Random().sample(others, min(len(others), _TRIES)):  # noqa: S311 - no secret
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("", port))
            return port
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _ephemeral_ports() -> range:
    """Ports that Linux assigns to sockets that ask for no particular one."""
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return range(32768, 65536)
    return range(first, last + 1)


@functools.cache
def this_host() -> str:
    """Identify this host by boot ID and PID namespace, because its name may change; by name without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def age_s() -> float:
    """Seconds since this process started."""
    since_boot = float(Path("/proc/uptime").read_text().split()[0])
    return max(0.0, since_boot - (_started(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK"))


def _started(pid: int) -> int | None:
    """Start time of a process (field 22 of /proc/<pid>/stat); None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
