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


# Scores are masked with a finite bias far below every real one, and a running maximum starts between the two: a row
# that saw nothing but masked scores then has weights exp(-5e29 + 1e20) = 0, without a special case and without NaN.
MASKED: tl.constexpr = tl.constexpr(1e30)
NO_SCORE: tl.constexpr = tl.constexpr(-1e20)


@triton.jit
def page_at(p_table, i_page, n_table, n_pages):
    """The place in the cache of page `i_page` of a batch, clamped: a bad id never leads outside of the cache."""
    i_entry = tl.minimum(tl.maximum(i_page, 0), n_table - 1)
    return tl.minimum(tl.maximum(tl.load(p_table + i_entry), 0), n_pages - 1).to(tl.int64)


@triton.jit
def softmax_step(b_s, b_m, b_z, b_o, b_v):
    """Take scores [R, C] and values [C, D] into the running maximum [R], sum [R] and output [R, D]."""
    b_max = tl.maximum(b_m, tl.max(b_s, axis=1), propagate_nan=tl.PropagateNan.ALL)
    b_p = tl.exp(b_s - b_max[:, None])
    b_shrink = tl.exp(b_m - b_max)
    b_z = b_z * b_shrink + tl.sum(b_p, axis=1)
    b_o = b_o * b_shrink[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return b_max, b_z, b_o


@triton.jit
def softmax_end(b_m, b_z, b_o):
    """Normalised output [R, D] and log-sum-exp [R]; 0 and NO_SCORE for rows that saw nothing."""
    seen = b_z > 0.0
    b_sum = tl.where(seen, b_z, 1.0)
    return b_o / b_sum[:, None], tl.where(seen, b_m + tl.log(b_sum), NO_SCORE)


@triton.jit
def split_weights(p_lse, o_s, o_w, n_splits, W: tl.constexpr):
    """How much each split of one row counts, [BS, 1], and the log-sum-exp of the row, [1].

    A split that saw nothing has NO_SCORE. W is the number of times a log-sum-exp is stored in [n_splits, W].
    """
    m_s = (o_s < n_splits)[:, None] & (o_w < W)[None, :]
    b_rows = tl.load(p_lse + o_s[:, None] * W + o_w[None, :], mask=m_s, other=NO_SCORE)
    b_lse = tl.max(b_rows, axis=1)[:, None]
    b_max = tl.max(b_lse, axis=0)
    b_weight = tl.exp(b_lse - b_max[:, None])
    b_z = tl.sum(b_weight, axis=0)
    return b_weight / b_z[:, None], b_max + tl.log(b_z)


@triton.jit
def join_splits(p_o, b_weight, o_s, o_v, n_splits, DV: tl.constexpr):
    """The output [BV] of one row from those of its splits, [n_splits, DV] in memory, weighted by [BS, 1]."""
    m_o = (o_s < n_splits)[:, None] & (o_v < DV)[None, :]
    b_o = tl.load(p_o + o_s[:, None] * DV + o_v[None, :], mask=m_o, other=0.0)
    return tl.sum(b_o * b_weight, axis=0)
