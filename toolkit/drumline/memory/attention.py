"""Which attention kernel torch selects on CUDA. Pure; used by the closed form and by the trace."""

from typing import Literal

Kernel = Literal["flash", "efficient", "math", "eager"]

_FLASH_HEAD_DIM = 256


def choose_kernel(
    *,
    is_narrow: bool,
    is_masked: bool,
    shares_heads: bool,
    head_dim: int,
    value_dim: int,
    has_flash: bool = True,
) -> Kernel:
    """The kernel that `scaled_dot_product_attention` dispatches to (aten/native/transformers/sdp_utils).

    Flash: 16-bit dtypes, no mask, head dimension at most 256 and that of values, too, compute capability 8.0
    (`has_flash`).
    Memory-efficient: any dtype, but no grouped-query attention (`shares_heads`). Otherwise math, which
    materializes the S² scores.
    """
    fits_flash = head_dim == value_dim and head_dim <= _FLASH_HEAD_DIM
    if is_narrow and not is_masked and fits_flash and has_flash:
        return "flash"
    return "math" if shares_heads else "efficient"
