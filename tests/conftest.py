"""Shared by all tests: one cache of prepared data, and small helpers to make plans."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

ROOT = Path(__file__).resolve().parent.parent
SOURCES = f"{ROOT}/toolkit:{ROOT}/launchers"
"""PYTHONPATH of a child process that is to import this checkout."""


for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # under nohup, or in the background of a script
        signal.signal(number, usual)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one way to change a golden file."""
    parser.addoption("--rewrite-goldens", action="store_true", help="write golden files anew")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups hold: pytest 9.2 ignores xdist's, and two Slurms at once would take each other's names."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and grouped:
        assert all("@" in item.nodeid for item in grouped), (
            "xdist's groups have no effect with this pytest"
        )


@pytest.fixture(scope="session", autouse=True)
def prepared_data_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data are shared by all tests of a session, also across xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    os.environ["DRUMLINE_CACHE"] = str(shared / "drumline-cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["XDG_STATE_HOME"] = str(base / "state")


@pytest.fixture(scope="session", autouse=True)
def torch_knows_what_makes_tensors() -> None:
    """torch remembers which functions `with torch.device(…)` acts on when that is first used.

    Where DeepSpeed has replaced them at that moment, for the time of a zero.Init, no later `with` acts on
    torch's own ones: transformers then takes an empty model for one with weights, and leaves its buffers as
    they stood in memory.
    """
    import torch
    from torch.utils._device import _device_constructors

    assert torch.tensor in _device_constructors()


def run_drumline(folder: Path, *arguments: str, timeout: float = 300) -> Any:
    """The real command in a folder; the completed process."""
    return subprocess.run(
        [sys.executable, "-m", "drumline.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": SOURCES},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def fork_server(
    prepared_data_cache: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ForkServer]:
    """One process of this worker with everything imported, which forks commands and ranks."""
    server = ForkServer(tmp_path_factory.mktemp("fork-server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def module_drumline() -> Any:
    """`run_drumline`, for fixtures that outlive a test."""
    return run_drumline


@pytest.fixture
def drumline(tmp_path: Path) -> Any:
    """Run the real command in a folder of its own; returns the completed process."""

    def run(*arguments: str, cwd: Path | None = None, timeout: float = 300) -> Any:
        return run_drumline(cwd or tmp_path, *arguments, timeout=timeout)

    return run


@pytest.fixture
def forked(fork_server: ForkServer, tmp_path: Path) -> Any:
    """As `drumline`, by a process that the fork server forks; only torchrun is stood in for."""

    def run(*arguments: str) -> Any:
        return fork_server.run(tmp_path, *arguments)

    return run


def tiny_recipe(**sections: Any) -> dict[str, Any]:
    """A small legal recipe as a plain mapping; sections replace its own key by key."""
    plain: dict[str, Any] = {
        "recipe": "tiny",
        "schema": 1,
        "seed": 5,
        "model": {"source": "factory", "factory": "example_models:mlp", "config": {
            "features": 32, "hidden": 16, "classes": 10}},
        "data": {"source": "builtin", "name": "synthetic-classification",
                 "task": "classification", "samples": 10000, "validation": 0.2},
        "batch": {"effective": 12, "per_device": 3, "gpus": 2, "weighting": "sample"},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "duration": {"steps": 20},
        "project": str(ROOT / "recipes"),
    }  # fmt: skip
    for name, values in sections.items():
        replace = not isinstance(values, dict) or not isinstance(plain.get(name), dict)
        plain[name] = values if replace else {**plain[name], **values}
    return plain
