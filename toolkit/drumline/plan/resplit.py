"""Moves a recipe to another number or kind of GPUs at the same effective batch."""

from typing import Any

from drumline.errors import PlanError
from drumline.plan.batch import Split, resplit
from drumline.plan.resolve import resolve
from drumline.plan.world import World
from drumline.recipe.schema import Recipe
from drumline.units import divisors


def on_gpus(recipe: Recipe, gpus: int | None, gpu: str | None, world: World) -> Recipe:
    """The recipe on `gpus` devices of kind `gpu` (None: unchanged).

    Keeps per_device if it divides the batch and fits, else takes the largest smaller one that does. If none
    fits, takes the largest that divides; the plan then reports that it does not fit.
    """
    split = resolve(recipe, world).batch.split
    wanted = resplit(split, gpus or split.gpus)
    rest = wanted.per_device * wanted.accumulation
    smaller = [b for b in divisors(rest) if b <= wanted.per_device]
    moved = [_moved(recipe, Split(b, wanted.gpus, rest // b), gpu) for b in reversed(smaller)]
    for candidate in moved:
        if resolve(candidate, world).memory.fits is not False:
            return candidate
    return moved[0]


def with_smaller_per_device(recipe: Recipe, split: Split) -> Recipe | None:
    """The recipe with the next smaller per_device at the same effective batch and gpus, used after an OOM.

    Evaluation's per_device is reduced to it too; once per_device is 1, evaluation's alone is halved. None if
    both are 1.
    """
    rest = split.per_device * split.accumulation
    smaller = max((b for b in divisors(rest) if b < split.per_device), default=None)
    evaluation = recipe.row_evaluation
    largest = evaluation.per_device if evaluation and evaluation.per_device else 1
    if smaller is None and largest == 1:
        return None
    b = smaller or split.per_device
    update: dict[str, Any] = {
        "batch": Split(b, split.gpus, rest // b).written_into(recipe.batch),
    }
    if evaluation:
        fewer = min(largest, b) if smaller else largest // 2
        update["evaluation"] = evaluation.model_copy(update={"per_device": fewer})
    return recipe.model_copy(update=update)


def _moved(recipe: Recipe, split: Split, gpu: str | None) -> Recipe:
    """The recipe with this split and kind of GPU, on part of one node or on whole nodes.

    Raises PlanError if the stated gpus_per_node does not divide a larger number of GPUs.
    """
    per_node = recipe.cluster.gpus_per_node
    if per_node and split.gpus > per_node and split.gpus % per_node:
        whole = split.gpus // per_node * per_node
        raise PlanError(
            f"--gpus {split.gpus}: more than one node of {per_node}, and {per_node} does not "
            f"divide {split.gpus}. Nearest: {whole} or {whole + per_node}; or cluster.gpus_per_node"
        )
    cluster = recipe.cluster.model_copy(
        update={
            "gpu": gpu or recipe.cluster.gpu,
            "nodes": None,
        }
    )
    update = {"batch": split.written_into(recipe.batch), "cluster": cluster}
    return recipe.model_copy(update=update)
