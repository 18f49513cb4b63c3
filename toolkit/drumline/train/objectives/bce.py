"""Binary cross-entropy of the labels of a row, each of them yes or no."""

from torch import nn
from torch.nn import functional

from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Batch, Objective, Sums
from drumline.train.objectives.mse import outputs_and_targets


def build(recipe: Recipe) -> Objective:
    """Build the binary cross-entropy."""
    return BinaryCrossEntropy()


class BinaryCrossEntropy(Objective):
    """Σ weight × mean over a row's classes of the binary cross-entropy.

    Reports the share of labels that are right, and F1 = 2·TP / (2·TP + FP + FN) over all of them.
    """

    metrics = ("accuracy", "f1")

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sum the losses of `targets`, float32 [n, C], NaN where ignored; the model's logits are [n, C]."""
        logits, targets, counted = outputs_and_targets(model, batch)
        losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        losses = losses.mean(dim=1).masked_fill(~counted, 0.0)
        weighted = losses * batch["weights"]
        counts = counted[:, None]  # no indexing by it, which would synchronise a GPU
        said, is_so = (logits > 0) & counts, (targets > 0) & counts
        both, right = (said & is_so).sum(), ((said == is_so) & counts).sum()
        metrics = {
            "accuracy": (right, counted.sum() * targets.shape[1]),
            "f1": (2 * both, said.sum() + is_so.sum()),
        }
        return Sums(weighted.sum(), metrics, weighted if "sources" in batch else None)
