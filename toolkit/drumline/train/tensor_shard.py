"""A rank's shard of a state tensor, as engines hand it out and checkpoints hold it."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from drumline.checkpoint.boxes import Boxes


@dataclass(frozen=True)
class TensorShard:
    """A rank's shard of one state tensor of global `shape`; `tensor` is local, of any shape.

    Its elements, in row-major order, are those of `boxes`, box after box. `copies`: the ranks that hold
    exactly the same elements, None if only this one does. `owned`: whether this rank is the one that writes
    them. `frozen`: a weight that needs no gradient, which training may still change by other means.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    boxes: Boxes
    owned: bool
    copies: dist.ProcessGroup | None = None
    frozen: bool = False
