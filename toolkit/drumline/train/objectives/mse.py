"""Mean squared error of the numbers of a row."""

from torch import Tensor, nn

from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Batch, Objective, Sums, at_least_fp32, model_inputs


def build(recipe: Recipe) -> Objective:
    """Build the mean squared error."""
    return MeanSquaredError()


class MeanSquaredError(Objective):
    """Σ weight × mean over a row's outputs of (output − target)²; reports the mean absolute error."""

    metrics = ("mae",)

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sum the errors of `targets`, float32 [n, k], NaN where ignored; the model's outputs are [n, k]."""
        errors, counted = counted_errors(model, batch)
        weighted = errors.square().mean(dim=1) * batch["weights"]
        absolute = (errors.abs().mean(dim=1).sum(), counted.sum())
        return Sums(weighted.sum(), {"mae": absolute}, weighted if "sources" in batch else None)


def counted_errors(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Outputs less targets, float [n, k], exactly zero in ignored rows; which rows are counted, bool [n]."""
    outputs, targets, counted = outputs_and_targets(model, batch)
    return outputs - targets, counted


def outputs_and_targets(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The model's outputs and the targets, float [n, k], both zero in ignored rows; which rows count."""
    found = model_inputs(model, batch)
    outputs = at_least_fp32(found if isinstance(found, Tensor) else found.logits)
    targets = batch["targets"]
    outputs = outputs.view_as(targets)
    ignored = targets.isnan()
    return outputs.masked_fill(ignored, 0.0), targets.nan_to_num(0.0), ~ignored[:, 0]
