"""Values of all ranks for losses that compare samples, such as those with the other samples as negatives.

Such a loss is no sum over samples: what a sample is compared with depends on the split. Gathered, it depends
on per_device × gpus instead of per_device.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE = contextvars.ContextVar("alone", default=False)


def gather_over_ranks(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Counted rows of all ranks, [M, …], in the order of the ranks; the place of each own row in them, [n].

    `values`: [n, …]; `counted`: bool [n], false for a row of a dummy, whose place is 0. A collective, whose
    gradient goes to the rank that a row came from. Alone it returns the rank's own rows.
    """
    own = values[counted]
    places = counted.long().cumsum(dim=0) - 1
    if _ALONE.get() or not dist.is_initialized() or dist.get_world_size() == 1:
        return own, places.where(counted, 0)
    size = torch.tensor([len(own)], device=values.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(one) for one in sizes]
    padded = torch.cat([own, own.new_zeros(max(counts) - len(own), *own.shape[1:])])
    whole = _Gather.apply(padded)
    rows = [whole[rank, :count] for rank, count in enumerate(counts)]
    return torch.cat(rows), (places + sum(counts[: dist.get_rank()])).where(counted, 0)


@contextlib.contextmanager
def one_row_at_a_time() -> Iterator[None]:
    """Context in which ranks do not wait for each other, as they read other numbers of rows."""
    token = _ALONE.set(True)
    yield
    _ALONE.reset(token)


class _Gather(torch.autograd.Function):
    """Tensors of all ranks, [G, …]; the gradient of each is summed over the ranks, on its own."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:  # type: ignore[override]
        """[…] -> [G, …]."""
        found = [torch.zeros_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(found, values.contiguous())
        return torch.stack(found)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """[G, …] -> […]."""
        whole = gradient.contiguous()
        dist.all_reduce(whole)
        return whole[dist.get_rank()]
