"""How a source's rows become samples: one class a task, found by the recipe's `data.task`.

To add one: its file here and its row in `TASKS` below, its name and facts in `recipe/schema.py`.
"""

from importlib import import_module
from typing import Any

from drumline.data.factory import load_factory
from drumline.data.tasks.base import IGNORED, Arrays, Encoded, Task
from drumline.errors import DataError
from drumline.recipe.schema import Data

TASKS = {
    "causal_lm": "drumline.data.tasks.causal_lm:CausalLm",
    "sft": "drumline.data.tasks.sft:Sft",
    "classification": "drumline.data.tasks.classification:Classification",
}

__all__ = ["IGNORED", "TASKS", "Arrays", "Encoded", "Task", "find_task"]


def find_task(data: Data, project: str | None) -> Task:
    """The task of a recipe's data section; `custom` is made by a function of the recipe's project."""
    if data.task_factory is None:
        module, _, name = TASKS[data.task].partition(":")
        task: Task = getattr(import_module(module), name)(data)
        return task
    made: Any = load_factory(data.task_factory, project)(**data.task_options)
    lacking = [name for name in ("encode", "collate") if not callable(getattr(made, name, None))]
    if lacking:
        raise DataError(
            f"data.task_factory: {data.task_factory} made a {type(made).__name__} without {lacking[0]}(). "
            "Nearest: a subclass of drumline.data.tasks.Task"
        )
    made.data = data
    return made  # type: ignore[no-any-return]
