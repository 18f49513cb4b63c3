"""Reads a run's environment: versions, platform, CPU, GPUs and driver, container."""

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from drumline import __version__
from drumline.runs.code import package_sha256

THAT_TRAIN = (
    "drumline",
    "python",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "deepspeed",
    "numpy",
    "safetensors",
    "tokenizers",
    "triton",
)
"""Packages whose version can change a result; differences in other packages are only counted."""

_NAME_OR_VERSION = re.compile(r"^(Name|Version):[ \t]*(\S+)", re.MULTILINE)
"""Of a distribution's metadata; importlib would parse all of it, twice for each of hundreds."""

_CONTAINERS = {
    "DRUMLINE_IMAGE": "image",
    "APPTAINER_CONTAINER": "apptainer",
    "SINGULARITY_CONTAINER": "apptainer",
    "SLURM_CONTAINER": "pyxis",
    "KUBERNETES_SERVICE_HOST": "kubernetes",
}
"""An image sets DRUMLINE_IMAGE to its own name and digest."""


def read_environment() -> dict[str, Any]:
    """Read versions, source hash, hardware and container, without importing torch."""
    return {
        "versions": read_versions(),
        "drumline_sha256": package_sha256(),
        "hardware": {
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "cpu": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "gpus": read_gpus(),
        },
        "container": _container(),
    }


def read_versions() -> dict[str, str | None]:
    """Versions of Python and all installed distributions; None for missing packages of THAT_TRAIN."""
    found: dict[str, str | None] = dict.fromkeys(THAT_TRAIN)
    for distribution in metadata.distributions():
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        stated = dict(_NAME_OR_VERSION.findall(text.partition("\n\n")[0]))
        if "Name" in stated:
            found[stated["Name"].lower().replace("_", "-")] = stated.get("Version")
    found |= {"drumline": __version__, "python": sys.version.split()[0]}
    return found


def read_gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each GPU that nvidia-smi lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    fields = "name,driver_version,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in listed.stdout.splitlines() if line.count(", ") == 2]
    return [{"name": name, "driver": driver, "memory": memory} for name, driver, memory in rows]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _container() -> str | None:
    for variable, kind in _CONTAINERS.items():
        value = os.environ.get(variable)
        if value:
            return f"{kind} {value}" if kind != "kubernetes" else kind
    return "docker" if Path("/.dockerenv").exists() else None
