"""Refuses rows that cannot be trained together, parts without rows, and arrays of two types."""

import math

from drumline.data.tasks import Task
from drumline.data.write_rows import Seen, Writers
from drumline.errors import DataError
from drumline.recipe.data_section import Data


def refuse_others(task: Task, other: Task) -> None:
    """DataError where the rows of two sources cannot lie side by side: chats and pairs, or other columns."""
    if any(getattr(other, key) != getattr(task, key) for key in ("sequences", "is_chat")):
        raise DataError(
            f"data: its rows are {other.style or 'prompts and completions'}, and the training rows are "
            f"{task.style or 'prompts and completions'}"
        )
    if other.columns != task.columns:
        raise DataError(
            f"data: its rows have {', '.join(other.columns)}, and the training rows have "
            f"{', '.join(task.columns)}"
        )


def refuse_few(task: Task, writers: Writers) -> None:
    """DataError where a part has rows, but not as many as the task needs."""
    for part, writer in writers.items():
        if 0 < writer.rows < task.fewest_rows:
            raise DataError(
                f"data: {writer.rows} of at least {task.fewest_rows} rows in {part}: each is compared with "
                "another's completion. Nearest: more rows, or another data.validation"
            )


def refuse_other_outputs(task: Task, trained: Seen, its: Seen) -> None:
    """DataError where rows of a source have labels for another number of outputs than those before."""
    if task.has_fixed_outputs and trained.classes and its.classes != trained.classes:
        raise DataError(
            f"data.label_field: {its.classes} numbers a row, and the training rows have {trained.classes}"
        )


def one_dtype_each(writers: Writers) -> dict[str, str]:
    """The dtype of every array of a custom task; DataError where two parts have different ones."""
    found: dict[str, str] = {}
    for part, writer in writers.items():
        for name, kind in writer.arrays.items():
            if found.setdefault(name, kind) != kind:
                raise DataError(
                    f"data.task_factory: array {name!r} is {kind} in {part}, after rows of {found[name]}"
                )
    return found


def refuse_empty(data: Data, seen: Seen, trained: int, held_out: int) -> None:
    """DataError where a source gave no training row (`trained`), or none for validation (`held_out`)."""
    documents = seen.documents
    if data.validation_split == "drawn" and trained and not seen.is_stream:
        documents = trained + held_out
    if documents == 0 or trained == 0:
        why = ""
        if seen.dropped:
            why = f": {seen.dropped} have no target within sequence_length {data.sequence_length}"
        raise DataError(f"data: {documents} documents gave no training rows{why}")
    if data.validation and held_out == 0:
        scale = 10 ** (len(str(documents)) + 1)
        enough = math.ceil(scale / documents) / scale  # rounded up
        fix = f"validation {enough:g} (one document)" if documents > 1 else "validation 0"
        raise DataError(
            f"data.validation: {data.validation} × {documents} documents = "
            f"{data.validation * documents:.2g}, which is none. Nearest: {fix}"
        )
