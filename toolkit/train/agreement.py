"""What all ranks agree on about one step: the only meeting of host and device in it."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """The step's loss (weighted mean, nats) and gradient norm, and what any rank asks for.

    `beside`: whatever else was summed over the ranks.
    """

    loss: float
    grad_norm: float
    stop: bool
    save_due: bool
    save_failed: bool
    beside: tuple[float, ...] = ()

    @property
    def loss_is_finite(self) -> bool:
        """Whether the forwards of all ranks came out finite."""
        return math.isfinite(self.loss)

    @property
    def finite(self) -> bool:
        """Whether the update may be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Agreement:
    """Sums the loss over ranks, and lets one rank's signal or rank 0's clock speak for all.

    Under way while the gradient is clipped; `reach` is the step's one wait for the device.
    """

    def __init__(
        self,
        loss: Tensor,
        stop: bool,
        save_due: bool,
        save_failed: bool,
        beside: Tensor | None = None,
    ) -> None:
        save_due = save_due and dist.get_rank() == 0
        flags = torch.tensor([stop, save_due, save_failed], dtype=torch.float32, device=loss.device)
        parts = [loss.reshape(1), flags] if beside is None else [loss.reshape(1), flags, beside]
        self._shared = torch.cat(parts)
        self._work = dist.all_reduce(self._shared, async_op=True)

    def reach(self, norm: Tensor) -> Verdict:
        """The verdict on the step, equal on every rank."""
        self._work.wait()
        found = torch.cat([self._shared, norm.reshape(1)]).tolist()
        loss, stops, due, failed, *beside, grad_norm = found
        return Verdict(loss, grad_norm, stops > 0, due > 0, failed > 0, tuple(beside))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank; a collective, equal on every rank."""
    shared = torch.tensor([float(flag)], device=device)
    dist.all_reduce(shared)
    return bool(shared.item() > 0)
