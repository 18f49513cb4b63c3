"""Whether training gives the same result under another split, and which parts of a model prevent it."""

from drumline.architectures.shapes import ModelShape
from drumline.plan.batch import Split
from drumline.plan.model import SplitInvariance
from drumline.recipe.schema import Recipe

SMALL_BATCHNORM = 8
_DROPOUT_KEYS = (
    "attention_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "dropout",
)


def split_invariance(
    recipe: Recipe, shape: ModelShape | None, factory_has_batchnorm: bool
) -> SplitInvariance:
    """Level `rounding` if the result depends on the split only by rounding; else `none` with all reasons."""
    reasons = []
    if factory_has_batchnorm:
        reasons.append(
            "BatchNorm normalises each micro-batch by its own statistics"
            + (
                " (synchronised over ranks, not over accumulation)"
                if recipe.model.sync_batchnorm
                else ""
            )
        )
    dropout = shape.dropout if shape else _stated_dropout(recipe)
    if dropout:
        reasons.append(f"dropout {dropout:g} draws its masks per micro-batch")
    if recipe.precision == "fp16":
        reasons.append("fp16 loss scaling overflows at places that depend on the split")
    if shape is None and recipe.model.source != "factory" and dropout is None:
        name = recipe.model.architecture or recipe.model.name or recipe.model.path
        reasons.append(
            f"{name} is not a known decoder: its dropout and auxiliary losses are unknown"
        )
    if reasons:
        return SplitInvariance("none", "; ".join(reasons))
    return SplitInvariance(
        "rounding", "every sample has the same weight in every split; only rounding differs"
    )


def batchnorm_warnings(recipe: Recipe, split: Split, factory_has_batchnorm: bool) -> list[str]:
    """Warn if BatchNorm normalises over fewer than SMALL_BATCHNORM samples (Wu and He 2018)."""
    seen = split.per_device * (split.gpus if recipe.model.sync_batchnorm else 1)
    if not factory_has_batchnorm or seen >= SMALL_BATCHNORM:
        return []
    return [
        f"BatchNorm sees {seen} samples at a time, fewer than {SMALL_BATCHNORM}: its statistics are "
        "noise. GroupNorm does not depend on the batch"
    ]


def _stated_dropout(recipe: Recipe) -> float | None:
    stated = [
        float(value)
        for key, value in recipe.model.config.items()
        if key in _DROPOUT_KEYS and isinstance(value, int | float)
    ]
    return max(stated) if stated else None
