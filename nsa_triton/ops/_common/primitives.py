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


@triton.jit
def load_rows(p_x, o_r, o_c, stride, n_r, n_c):
    """[R, C] the first n_r rows and n_c columns of a matrix, else 0."""
    m_x = (o_r < n_r)[:, None] & (o_c < n_c)[None, :]
    return tl.load(p_x + o_r[:, None] * stride + o_c[None, :], mask=m_x, other=0.0)


# Masked scores are finite and far below every real one, and a running maximum starts between the two: a row that saw
# nothing but masked scores then has weights exp(-1e30 + 1e20) = 0, without a special case and without NaN. They are
# selected, not added: where keys were loaded under a mask, the Ascend compiler shortens the product too, and the
# columns behind it hold what the accumulator held before, be it NaN.
MASKED: tl.constexpr = tl.constexpr(-1e30)
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
def weights_and_slopes(b_a, b_b, b_c, b_d, b_lse, b_delta, scale):
    """The probabilities exp(scale a b^T - lse), and c d^T - delta, by which they are multiplied in the gradient of the
    scores: of queries, keys, gradients and values, or turned, of keys, queries, values and gradients."""
    b_p = tl.exp(tl.dot(b_a, tl.trans(b_b), input_precision="ieee") * scale - b_lse)
    return b_p, tl.dot(b_c, tl.trans(b_d), input_precision="ieee") - b_delta


@triton.jit
def query_rows(rows, i_b, n_tokens, n_all, RAGGED: tl.constexpr):
    """The rows of the query tokens of a batch, from the first to behind the last, both within the n_all rows that there
    are; and, as the table says it, the row behind the newest token."""
    if RAGGED:
        i_first = tl.load(rows + i_b * 2).to(tl.int64)
        i_end = i_first + tl.load(rows + i_b * 2 + 1)
        i_begin = tl.minimum(tl.maximum(i_first, 0), n_all)
        return i_begin.to(tl.int32), tl.minimum(tl.maximum(i_end, i_begin), n_all).to(tl.int32), i_end
    else:
        return i_b * n_tokens, (i_b + 1) * n_tokens, ((i_b + 1) * n_tokens).to(tl.int64)


# A select with a mask of columns is done row by row on Ascend and waits for the scalar unit each time; a product isn't.
# Where a factor is not finite, the row's softmax is NaN all over anyway.


@triton.jit
def is_column(o_c, i_c):
    """1.0 at column i_c, else 0.0; the column numbers o_c are float32."""
    return tl.where(o_c == i_c, 1.0, 0.0)


@triton.jit
def column(b_tile, o_c, i_c):
    """Column i_c [R] of a tile [R, C]."""
    return tl.sum(b_tile * is_column(o_c, i_c)[None, :], axis=1)


@triton.jit
def store_state(p_state, b_m, b_z, o_r, o_w, m_r, stride):
    """Maximum and sum [R] of a split, in rows of 32 bytes."""
    f_w = o_w.to(tl.float32)
    b_state = b_m[:, None] * is_column(f_w, 0.0)[None, :] + b_z[:, None] * is_column(f_w, 1.0)[None, :]
    tl.store(p_state + o_r[:, None] * stride + o_w[None, :], b_state, mask=m_r[:, None])


@triton.jit
def load_states(p_state, o_s, o_w, n_splits, W: tl.constexpr):
    """Maxima and sums, [BS, 1] each, of splits; NO_SCORE and 0 for those that are not there."""
    b_state = tl.load(p_state + o_s[:, None] * W + o_w[None, :], mask=(o_s < n_splits)[:, None], other=NO_SCORE)
    b_m = column(b_state, o_w.to(tl.float32), 0.0)
    b_z = tl.maximum(column(b_state, o_w.to(tl.float32), 1.0), 0.0, tl.PropagateNan.ALL)
    return b_m[:, None], b_z[:, None]


@triton.jit
def join_states(p_state, o_s, o_w, n_splits, W: tl.constexpr):
    """Maximum and sum, [1] each, of all splits of a row. A row that saw nothing has sum 1, to divide its zeros by."""
    b_m, b_z = load_states(p_state, o_s, o_w, n_splits, W)
    b_max = tl.max(b_m, axis=0)
    b_sum = tl.sum(b_z * tl.exp(b_m - b_max[:, None]), axis=0)
    return b_max, tl.where(b_sum > 0.0, b_sum, 1.0)


@triton.jit
def join_outputs(
    p_o,
    p_state,
    b_max,
    b_sum,
    o_w,
    o_v,
    n_splits,
    DV: tl.constexpr,
    W: tl.constexpr,
    BS: tl.constexpr,
    BV: tl.constexpr,
):
    """The output [BV] of a row from those of its splits, [n_splits, DV] in memory, BS at a time."""
    o_s = tl.arange(0, BS)
    b_o = tl.zeros([BV], tl.float32)
    for i_s in range(0, n_splits, BS):
        b_m, _ = load_states(p_state + i_s * W, o_s, o_w, n_splits - i_s, W)
        m_o = (o_s < n_splits - i_s)[:, None] & (o_v < DV)[None, :]
        b_part = tl.load(p_o + i_s * DV + o_s[:, None] * DV + o_v[None, :], mask=m_o, other=0.0)
        b_o += tl.sum(b_part * tl.exp(b_m - b_max[:, None]), axis=0)
    return b_o / b_sum
