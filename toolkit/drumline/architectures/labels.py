"""How many classes a classifier's head has: as stated, as in a saved model, or as in the data. Pure."""

from collections.abc import Mapping
from typing import Any

from drumline.errors import PlanError


def number_of_labels(
    stated: Mapping[str, Any],
    saved: Mapping[str, Any] | None,
    classes: int | None,
    problem: str | None = None,
) -> int | None:
    """Outputs of the head; None if nothing says it.

    `problem`: transformers' word for what they are, None for classes that exclude each other.

    `stated`: the recipe's model.config; `saved`: config.json of a pretrained model, whose labels are kept
    where they cover the data's; `classes`: of the prepared data. PlanError if the data have one class only,
    or one that the head lacks.
    """
    if problem == "regression":
        labels = stated.get("num_labels")
        if labels is not None and classes and labels != classes:
            raise PlanError(
                f"model.config.num_labels: {labels}, and the data have {classes} numbers a row. Nearest: "
                f"num_labels {classes}"
            )
        return classes or (None if labels is None else int(labels))
    if classes == 1 and problem is None:
        raise PlanError(
            "data: every row has class 0, so there is nothing to learn. Nearest: data with two classes"
        )
    labels = stated.get("num_labels")
    where, fix = "model.config.num_labels", f"num_labels {classes}"
    if labels is None and saved:
        names = saved.get("id2label")
        labels = saved.get("num_labels") or (len(names) if names else None)
        where = "the pretrained model's head"
        fix = f"model.config.num_labels={classes}, which draws a new head"
    if labels is None:
        return classes
    if classes and labels < classes:
        raise PlanError(f"{where}: {labels} < {classes} classes of the data. Nearest: {fix}")
    return int(labels)
