"""The Python interface: what the commands do, for scripts and notebooks. `import drumline` offers it."""

from drumline.api.planning import Overrides, RecipeLike, ShownPlan, estimate_memory, plan
from drumline.api.runs import Checkpoint, Reproduction, Run, load_run, reproduce, run

__all__ = [
    "Checkpoint",
    "Overrides",
    "RecipeLike",
    "Reproduction",
    "Run",
    "ShownPlan",
    "estimate_memory",
    "load_run",
    "plan",
    "reproduce",
    "run",
]
