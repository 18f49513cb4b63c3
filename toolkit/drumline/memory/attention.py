"""Which attention kernel a CUDA build of torch takes. Pure: the estimate and the trace share it."""

from typing import Literal

Kernel = Literal["flash", "efficient", "math", "eager"]

_FLASH_HEAD_DIM = 256


def choose_kernel(
    *, is_narrow: bool, is_masked: bool, shares_heads: bool, head_dim: int, has_flash: bool = True
) -> Kernel:
    """What `scaled_dot_product_attention` dispatches to (aten/native/transformers/sdp_utils).

    Flash: 16-bit types, no mask, heads of at most 256, compute capability 8.0 (`has_flash`).
    Memory-efficient: any type, but no heads shared between queries. Else math, which holds S² scores.
    """
    if is_narrow and not is_masked and head_dim <= _FLASH_HEAD_DIM and has_flash:
        return "flash"
    return "math" if shares_heads else "efficient"
