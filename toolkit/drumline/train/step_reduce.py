"""What all ranks learn about a step in one reduction: the only meeting of host and device in it."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """The step's loss (weighted mean, nats) and gradient norm, and what any rank asks for.

    `extra_sums`: whatever else was summed over the ranks.
    """

    loss: float
    grad_norm: float
    stop: bool
    save_due: bool
    save_failed: bool
    extra_sums: tuple[float, ...] = ()

    @property
    def loss_is_finite(self) -> bool:
        """Whether the forwards of all ranks came out finite."""
        return math.isfinite(self.loss)

    @property
    def finite(self) -> bool:
        """Whether the update may be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepReduce:
    """Sums the loss over ranks, and lets one rank's signal or rank 0's clock speak for all.

    Starts at once and runs while the gradient is clipped; `wait` is the step's one wait for the device.
    Nothing else here may make the host wait: flags are written by kernels, not copied from host memory.
    """

    def __init__(
        self,
        loss: Tensor,
        *,
        stop: bool,
        save_due: bool,
        save_failed: bool,
        extra_sums: Tensor | None = None,
    ) -> None:
        flags = (stop, save_due and dist.get_rank() == 0, save_failed)
        parts = [loss.reshape(1), *(on_device(flag, loss.device).reshape(1) for flag in flags)]
        if extra_sums is not None:
            parts.append(extra_sums)
        self._shared = torch.cat(parts)
        self._work = dist.all_reduce(self._shared, async_op=True)

    def wait(self, norm: Tensor) -> Verdict:
        """The verdict on the step, equal on every rank."""
        self._work.wait()
        found = torch.cat([self._shared, norm.reshape(1)]).tolist()
        loss, stops, due, failed, *extra_sums, grad_norm = found
        return Verdict(
            loss=loss,
            grad_norm=grad_norm,
            stop=stops > 0,
            save_due=due > 0,
            save_failed=failed > 0,
            extra_sums=tuple(extra_sums),
        )


def on_device(value: float, device: torch.device) -> Tensor:
    """A number as float32 [], written by a kernel: torch.tensor would copy it and wait for the copy."""
    return torch.full((), float(value), dtype=torch.float32, device=device)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank; a collective, equal on every rank. Waits for the device."""
    shared = on_device(flag, device)
    dist.all_reduce(shared)
    return bool(shared.item() > 0)
