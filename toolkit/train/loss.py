"""The weighted sum of losses: what each sample weighs, and never a mean of means.

The gradient of a step is (1/W) · d/dθ Σ loss over every counted token (or sample) of the whole
effective batch. A forward returns its part of Σ; the loop alone divides by W.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from toolkit.data.rows import IGNORED
from toolkit.memory.load import CHUNK_TOKENS

Batch = dict[str, Tensor]


class LossModule(nn.Module):
    """Model and loss as one module, so that DDP and FSDP wrap the whole forward.

    forward(batch) -> float32 [2]: the weighted sum of losses in nats, and for classification the
    number of rows predicted right (0 otherwise). `weights`, float32 [n], is what one counted token
    of each row weighs.
    """

    def __init__(self, model: nn.Module, task: str, chunked: bool) -> None:
        super().__init__()
        self.model = model
        self._task, self._chunked = task, chunked

    def forward(self, batch: Batch) -> Tensor:
        """The weighted sum of this micro-batch, with its count of right answers."""
        if self._task == "classification":
            return self._classification(batch)
        if self._chunked:
            return _with_count(self._chunked_sum(batch))
        logits = self.model(input_ids=batch["input_ids"]).logits
        return _with_count(token_loss_sum(logits, batch["targets"], batch["weights"]))

    def _classification(self, batch: Batch) -> Tensor:
        if "features" in batch:
            output = self.model(batch["features"])
            logits = output if isinstance(output, Tensor) else output.logits
        else:
            logits = self.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        targets, weights = batch["targets"], batch["weights"]
        logits = _at_least_fp32(logits)
        losses = functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
        right = (logits.argmax(dim=-1) == targets).sum()
        return torch.stack([(losses * weights).sum(), right.to(losses.dtype)])

    def _chunked_sum(self, batch: Batch) -> Tensor:
        """The same sum without ever holding all logits: recomputed chunk by chunk in backward."""
        model: Any = self.model
        hidden = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
        head = model.get_output_embeddings()
        rows = max(1, CHUNK_TOKENS // hidden.shape[0])
        total = batch["weights"].new_zeros(())
        for start in range(0, hidden.shape[1], rows):
            part = slice(start, start + rows)
            total = total + checkpoint(
                lambda h, t, w: token_loss_sum(head(h), t, w),
                hidden[:, part],
                batch["targets"][:, part],
                batch["weights"],
                use_reentrant=False,
            )
        return total


def token_loss_sum(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ weight × cross-entropy over counted tokens: logits [n, L, V], targets [n, L], weights [n].

    A target of -100 adds exactly zero, to the value and to every gradient.
    """
    losses = functional.cross_entropy(
        _at_least_fp32(logits).flatten(0, 1),
        targets.flatten(),
        reduction="none",
        ignore_index=IGNORED,
    )
    return (losses.view_as(targets) * weights.unsqueeze(1)).sum()


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _with_count(total: Tensor) -> Tensor:
    return torch.stack([total, torch.zeros_like(total)])
