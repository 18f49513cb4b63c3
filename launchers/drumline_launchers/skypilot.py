"""Renders a SkyPilot task for `sky launch`, as a plain mapping. Pure."""

import shlex
from pathlib import Path
from typing import Any

from drumline.errors import LaunchError
from drumline.plan.model import Plan
from drumline_launchers.base import attend_command
from drumline_launchers.site import Site

ACCELERATORS = {
    "a100-40gb": "A100",
    "a100-80gb": "A100-80GB",
    "h100-80gb": "H100",
    "h200": "H200",
    "b200": "B200",
    "l4": "L4",
    "l40s": "L40S",
    "a10g": "A10G",
    "v100-32gb": "V100-32GB",
    "rtx-3090": "RTX3090",
    "rtx-4090": "RTX4090",
    "rtx-5090": "RTX5090",
    "mi300x": "MI300X",
    "t4": "T4",
    "a10": "A10",
    "a40": "A40",
    "v100-16gb": "V100",
    "rtx-a6000": "RTXA6000",
    "rtx-6000-ada": "RTX6000-Ada",
    "gh200-96gb": "GH200",
    "gb200": "GB200",
    "b300": "B300",
}
"""Maps drumline's GPU names to SkyPilot's."""


def render_task(plan: Plan, site: Site, recipe_file: Path) -> dict[str, Any]:
    """Render the task: every node runs `drumline attend` on one run folder, with SkyPilot's node rank."""
    gpu, per_node = plan.recipe.cluster.gpu_name, plan.mesh.ranks_per_node
    resources: dict[str, Any] = {}
    if gpu != "cpu" and gpu not in ACCELERATORS:
        raise LaunchError(
            f"--to skypilot: {gpu} has no SkyPilot name that is known here. Nearest: one of "
            f"{', '.join(ACCELERATORS)}"
        )
    if gpu != "cpu":
        resources["accelerators"] = f"{ACCELERATORS[gpu]}:{per_node}"
    if site.cpus_per_node:
        resources["cpus"] = f"{site.cpus_per_node}+"
    run = f"{site.runs or '/runs'}/{plan.recipe.recipe}"
    start = attend_command(run, plan.batch.nodes, "~/drumline")
    return {
        "name": plan.recipe.recipe,
        "num_nodes": plan.batch.nodes,
        "resources": resources,
        "file_mounts": {"~/drumline/recipe.yaml": str(recipe_file)},
        "setup": "\n".join([*site.setup, "pip install drumline"]),
        "run": "export NODE_RANK=$SKYPILOT_NODE_RANK\n"
        + shlex.join(start).replace("'~/drumline'", "~/drumline"),
    }
