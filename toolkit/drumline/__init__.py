"""drumline: every rank in step. One recipe, one batch equation, the same training however it is split.

    import drumline

    plan = drumline.plan("llama-8b-8xh100", {"batch.per_device": 4})
    run = drumline.run("recipe.yaml")
    drumline.load_run("runs/mine-1").metrics

The Python interface is in `drumline.api`, which is imported when one of its names is first used.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drumline import errors
    from drumline.api import (
        Checkpoint,
        Reproduction,
        Run,
        ShownPlan,
        estimate_memory,
        load_run,
        plan,
        reproduce,
        run,
    )

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "Reproduction",
    "Run",
    "ShownPlan",
    "__version__",
    "errors",
    "estimate_memory",
    "load_run",
    "plan",
    "reproduce",
    "run",
]


class PlanPackage(ModuleType):
    """The package `drumline.plan`, which can be called: `drumline.plan(recipe)` is `drumline.api.plan`."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Plan a recipe; see `drumline.api.plan`."""
        return import_module("drumline.api").plan(*arguments, **named)


def __getattr__(name: str) -> Any:
    if name in ("plan", "errors"):
        return import_module(f"drumline.{name}")
    if name in __all__:
        return getattr(import_module("drumline.api"), name)
    raise AttributeError(f"module 'drumline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
