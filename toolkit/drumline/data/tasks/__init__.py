"""Turns rows of a source into samples: one class per task, selected by the recipe's `data.task`.

The task named `x` is what `build(data)` of `data/tasks/x.py` returns; chats with images, which are `sft`,
too, have a file of their own. To add one: that file, and its name
and facts in `recipe/data_section.py`.
"""

from importlib import import_module
from typing import Any

from drumline.data.factory import load_factory
from drumline.data.tasks.base import IGNORED, Arrays, Encoded, Task
from drumline.data.tasks.map_style import MapStyle
from drumline.errors import DataError
from drumline.recipe.data_section import Data

__all__ = ["IGNORED", "Arrays", "Encoded", "Task", "find_task"]


def find_task(data: Data, project: str | None) -> Task:
    """The task of a recipe's data section; `custom` is made by a function of the recipe's project."""
    if data.is_map_style:
        return MapStyle(data, project)
    if data.task_factory is None:
        name = "chat_images" if data.is_chat_with_images else data.task
        task: Task = import_module(f"{__name__}.{name}").build(data)
        task.project = project
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
