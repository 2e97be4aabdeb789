"""Device helpers shared by the kernels. Imports triton: never import this module from torch-only code."""

import triton
import triton.language as tl

try:  # triton-ascend 3.2.1 and later
    from triton.language.extra.cann.extension import extract_slice
except ImportError:  # triton-ascend 3.2.0 has it in tl; upstream Triton has no such op and never asks for it
    extract_slice = getattr(tl, "extract_slice", None)


@triton.jit
def rows_of(
    b_tile,  # [*, C] the tile that holds the rows, used if RESIDENT
    p_row,  # pointer to the first wanted row, used if not
    i_row,  # its index in b_tile
    stride,
    o_r,  # [R] row offsets
    o_c,  # [C] column offsets
    R: tl.constexpr,
    C: tl.constexpr,
    n_rows: tl.constexpr,  # rows that exist, n_rows <= R
    n_cols,  # columns that exist
    RESIDENT: tl.constexpr,
):
    """R consecutive rows of a tile that was loaded before, without another trip to memory.

    On Ascend the tile lives in the unified buffer and the rows are a view of it. A GPU cannot index its registers, but
    has the rows in its L1 cache: there they are loaded again.
    """
    if RESIDENT:
        return extract_slice(b_tile, [i_row, 0], [R, C], [1, 1])
    else:
        mask = (o_r < n_rows)[:, None] & (o_c < n_cols)[None, :]
        return tl.load(p_row + o_r[:, None] * stride + o_c[None, :], mask=mask, other=0.0)
