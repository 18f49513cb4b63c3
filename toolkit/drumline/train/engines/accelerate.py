"""Hugging Face accelerate: its Accelerator owns the device, the precision, DDP and backward.

Not used: `accumulate()`, which averages the means of micro-batches; its scheduler, which steps once per
process; its gradient scaler, which detects overflow on each rank separately. FSDP2 shards block by block as
in the torch engine, because the Accelerator would first hold the whole model on every rank.
"""

import contextlib
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs
from torch import Tensor

from drumline.errors import LaunchError
from drumline.train.engines.torch import TorchEngine


class AccelerateEngine(TorchEngine):
    """The torch engine with an Accelerator for DDP, autocast and backward."""

    def _wrap(self) -> Any:
        wrapped_by_us = super()._wrap()
        if (
            self.accelerator.num_processes != self.mesh.ranks
            or self.accelerator.process_index != self.rank
        ):
            raise LaunchError(
                f"accelerate sees process {self.accelerator.process_index} of "
                f"{self.accelerator.num_processes}, the plan names rank {self.rank} of {self.mesh.ranks}"
            )
        if self.accelerator.device.type != self.device.type:
            raise LaunchError(
                f"accelerate took device {self.accelerator.device}, the plan names {self.device}"
            )
        return wrapped_by_us

    @property
    def accelerator(self) -> Accelerator:
        """The Accelerator, made on first use within the worker's process group."""
        if not hasattr(self, "_accelerator"):
            on_gpu = self.device.type == "cuda"
            precision = self.plan.recipe.precision if self._autocast else "no"
            self._accelerator = Accelerator(
                cpu=not on_gpu,
                mixed_precision=precision if on_gpu or precision != "fp16" else "no",
                kwargs_handlers=[
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                    GradScalerKwargs(enabled=False),
                ],
            )
        return self._accelerator

    def _replicated_module(self) -> Any:
        handler = self.accelerator.ddp_handler
        assert handler
        handler.broadcast_buffers = self.has_batchnorm
        return self.accelerator.prepare_model(self.module)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast and self.accelerator.mixed_precision == "no":  # fp16 on a CPU
            return super()._precision()
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)
