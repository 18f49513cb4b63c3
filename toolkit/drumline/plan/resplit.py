"""Another number or kind of GPUs at the same effective batch."""

from typing import Any

from drumline.errors import PlanError
from drumline.plan.batch import Split, resplit
from drumline.plan.resolve import World, resolve
from drumline.recipe.schema import Recipe
from drumline.units import divisors


def on_gpus(recipe: Recipe, gpus: int | None, gpu: str | None, world: World) -> Recipe:
    """The recipe on `gpus` devices of kind `gpu` (None: as it is).

    Keeps per_device where it divides and fits, else the largest smaller one that does; where none
    fits, the largest that divides, and the plan then says that it does not fit.
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
    """After running out of memory: the next smaller per_device, the same effective batch and gpus.

    Evaluation shrinks with it; once per_device is 1, evaluation alone. None when nothing is left.
    """
    rest = split.per_device * split.accumulation
    smaller = max((b for b in divisors(rest) if b < split.per_device), default=None)
    evaluation = recipe.evaluation
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
    """On part of one node, or on whole nodes of the stated size."""
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
