"""The one all-reduce of a step's loss and flags, with the step's only device synchronisation."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """The step's loss (weighted mean, nats), gradient norm, and flags that any rank has set.

    `extra_sums` and `beside_loss`: further values summed over the ranks, as passed to `StepReduce`; the
    latter are metrics of the step and the sums of a mixture's sources.
    """

    loss: float
    grad_norm: float
    stop: bool
    save_due: bool
    save_failed: bool
    extra_sums: tuple[float, ...] = ()
    beside_loss: tuple[float, ...] = ()

    @property
    def loss_is_finite(self) -> bool:
        """Whether the loss summed over all ranks is finite."""
        return math.isfinite(self.loss)

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are both finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepReduce:
    """Sums the loss over ranks, and shares flags: a stop or failed save on any rank, a save due on rank 0.

    The all-reduce starts at once and overlaps gradient clipping; `wait` is the step's only device
    synchronisation. So that nothing else waits, flags are written by kernels, not copied from host memory.
    """

    def __init__(
        self,
        loss: Tensor,
        *,
        stop: bool,
        save_due: bool,
        save_failed: bool,
        extra_sums: Tensor | None = None,
        beside_loss: Tensor | None = None,
    ) -> None:
        flags = (stop, save_due and dist.get_rank() == 0, save_failed)
        parts = [loss.reshape(1), *(on_device(flag, loss.device).reshape(1) for flag in flags)]
        parts += [more for more in (beside_loss, extra_sums) if more is not None]
        self._beside = 0 if beside_loss is None else len(beside_loss)
        self._shared = torch.cat(parts)
        # Alone there is nothing to sum, and NCCL's first collective would take half a gigabyte.
        self._work = dist.all_reduce(self._shared, async_op=True) if is_shared() else None

    def wait(self, norm: Tensor) -> Verdict:
        """The verdict on the step, equal on every rank."""
        if self._work:
            self._work.wait()
        found = torch.cat([self._shared, norm.reshape(1)]).tolist()
        loss, stops, due, failed, *more, grad_norm = found
        return Verdict(
            loss=loss,
            grad_norm=grad_norm,
            stop=stops > 0,
            save_due=due > 0,
            save_failed=failed > 0,
            extra_sums=tuple(more[self._beside :]),
            beside_loss=tuple(more[: self._beside]),
        )


def is_shared() -> bool:
    """Whether there is another rank to agree with."""
    return dist.get_world_size() > 1


def on_device(value: float, device: torch.device) -> Tensor:
    """A number as float32 [], filled in by a kernel: torch.tensor would copy it and synchronise."""
    return torch.full((), float(value), dtype=torch.float32, device=device)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank: a collective with a device synchronisation."""
    shared = on_device(flag, device)
    if is_shared():
        dist.all_reduce(shared)
    return bool(shared.item() > 0)
