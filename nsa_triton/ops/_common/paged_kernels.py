"""Kernels of attention of a few query tokens over a paged cache: over blocks that ids name, or over a sliding window.

    s[h, i] = scale q[t, h, :] k[i, :]       over the tokens i of the blocks that ids[t, n, :] names, or of the window
    out[t, h, :] = sum_i exp(s[h, i] - lse[h]) v[i, :]

Names: T rows of q, N1 query heads and N2 kv heads, G = N1 / N2 heads in the group of one kv head; K ids per row, L
tokens per block, P tokens per page. The heads of a group are the rows of a tile. A cut is a page, or a part of it that
fits a tile. A piece is what a cut has in common with a block or with the window: its keys and values are one load each.
The list of pieces is cut into splits, so that one sequence alone keeps all cores busy; a second kernel joins the splits
in a fixed order.
"""

import triton
import triton.language as tl

from nsa_triton.ops._common.primitives import (
    MASKED,
    NO_SCORE,
    join_outputs,
    join_states,
    page_at,
    query_rows,
    softmax_step,
    store_state,
)

MOST_TOKENS: tl.constexpr = tl.constexpr(1 << 30)  # of a sequence: beyond, the place where a cut ends might overflow


@triton.jit
def piece_of_block(p_ids, i_piece, n_visible, L: tl.constexpr, CUT: tl.constexpr, PIECES: tl.constexpr):
    """The cut that piece i_piece of the selected blocks lies in, its first token, and how many it has: none where the
    block has no token in that cut, or is not there."""
    n_blocks = (n_visible - 1) // L + 1
    i_block = tl.load(p_ids + i_piece // PIECES)
    exists = (i_block >= 0) & (i_block < n_blocks)
    i_0 = tl.where(exists, i_block, 0) * L
    n_0 = tl.where(exists, tl.minimum(L, n_visible - i_0), 0)
    i_cut = (i_0 // CUT + i_piece % PIECES) * CUT
    i_i = tl.maximum(i_0, i_cut)
    return i_cut, i_i, tl.minimum(i_0 + n_0, i_cut + CUT) - i_i


@triton.jit
def piece_of_window(i_piece, n_visible, WINDOW: tl.constexpr, CUT: tl.constexpr):
    """The same of the newest WINDOW tokens, from the newest piece to the oldest."""
    i_cut = ((n_visible - 1) // CUT - i_piece) * CUT
    i_i = tl.maximum(tl.maximum(n_visible - WINDOW, 0), i_cut)
    return i_cut, i_i, tl.minimum(n_visible, i_cut + CUT) - i_i


@triton.jit(do_not_specialize=["n_items", "n_tokens", "n_all", "n_table", "n_pages"])
def paged_split(
    q,  # [T, N1, DK]
    k,  # [n_pages, P, N2, DK]
    v,  # [n_pages, P, N2, DV]
    ids,  # [T, N2, K] int32; dead if WINDOW
    table,  # [B, n_table] int32, page ids
    lengths,  # [B] int32, tokens in the cache
    rows,  # [B, 2] int32, first row of q and query tokens; dead if not RAGGED
    o,  # [T, N1, SPLITS, DV] float32, or the output itself
    state,  # [T, N1, SPLITS, W] float32, maximum and sum, or [T, N1], the log-sum-exp itself
    scale,
    n_items,
    n_tokens,  # query tokens per batch, if not RAGGED
    n_all,  # T
    n_table,
    n_pages,
    N2,
    q_t,  # strides
    q_h,
    k_p,
    k_i,
    k_n,
    v_p,
    v_i,
    v_n,
    G: tl.constexpr,
    K: tl.constexpr,  # ids; cuts that the window may touch, if WINDOW
    L: tl.constexpr,  # dead if WINDOW
    WINDOW: tl.constexpr,  # newest tokens that a query token attends to; 0: the blocks that ids name
    P: tl.constexpr,
    CUT: tl.constexpr,  # tokens that are loaded at once; divides P
    PIECES: tl.constexpr,  # cuts that a block may touch; 1 if WINDOW
    SPLITS: tl.constexpr,
    W: tl.constexpr,  # floats in 32 bytes, the least that an NPU moves
    RAGGED: tl.constexpr,
    BH: tl.constexpr,  # heads per tile
    BN: tl.constexpr,  # tokens per tile: those of the longest piece
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,  # DK, or the power of two above it
    BV: tl.constexpr,  # DV, or the power of two above it
):
    o_h = tl.arange(0, BH)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_w = tl.arange(0, W)
    # [BH, BN]
    b_column = tl.zeros([BH, BN], tl.float32) + o_n.to(tl.float32)[None, :]
    n_tiles = (G + BH - 1) // BH
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_split = i_item % SPLITS
        i_h = i_item // SPLITS % n_tiles * BH
        i_n = i_item // (SPLITS * n_tiles) % N2
        i_b = i_item // (SPLITS * n_tiles) // N2
        i_begin, i_end, i_newest = query_rows(rows, i_b, n_tokens, n_all, RAGGED)
        n_kv = tl.minimum(tl.load(lengths + i_b), MOST_TOKENS)
        p_table = table + i_b.to(tl.int64) * n_table
        for i_t in range(i_begin, i_end):
            i_row = i_t.to(tl.int64)
            # each query token sees the cache up to itself
            n_visible = tl.maximum(n_kv - (i_newest - 1 - i_row), 0).to(tl.int32)
            # [BH, BK]
            p_q = q + i_row * q_t + (i_n * G + i_h) * q_h
            m_h = o_h < G - i_h
            b_q = tl.load(p_q + o_h[:, None] * q_h + o_k[None, :], mask=m_h[:, None] & (o_k < DK)[None, :], other=0.0)
            # [BH], [BH], [BH, BV]
            b_m = tl.full([BH], NO_SCORE, tl.float32)
            b_z = tl.zeros([BH], tl.float32)
            b_o = tl.zeros([BH, BV], tl.float32)
            for i_piece in range(i_split * K // SPLITS * PIECES, (i_split + 1) * K // SPLITS * PIECES):
                if WINDOW:
                    i_cut, i_i, n_i = piece_of_window(i_piece, n_visible, WINDOW, CUT)
                else:
                    p_ids = ids + (i_row * N2 + i_n) * K
                    i_cut, i_i, n_i = piece_of_block(p_ids, i_piece, n_visible, L, CUT, PIECES)
                i_page = page_at(p_table, i_cut // P, n_table, n_pages)
                # [BN, BK]; one row at least, because a product of no columns is none
                m_k = (o_n < tl.maximum(n_i, 1))[:, None] & (o_k < DK)[None, :]
                p_k = k + i_page * k_p + i_i % P * k_i + i_n * k_n
                b_k = tl.load(p_k + o_n[:, None] * k_i + o_k[None, :], mask=m_k, other=0.0)
                # [BH, BN]
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
                b_s = tl.where(b_column < n_i * 1.0, b_s, MASKED)
                # [BN, BV]
                m_v = (o_n < n_i)[:, None] & (o_v < DV)[None, :]
                p_v = v + i_page * v_p + i_i % P * v_i + i_n * v_n
                b_v = tl.load(p_v + o_n[:, None] * v_i + o_v[None, :], mask=m_v, other=0.0)
                b_m, b_z, b_o = softmax_step(b_s, b_m, b_z, b_o, b_v)
            i_out = (i_row * N2 + i_n) * G + i_h
            p_o = o + (i_out * SPLITS + i_split) * DV
            if SPLITS == 1:
                seen = b_z > 0.0
                b_sum = tl.where(seen, b_z, 1.0)
                b_out = (b_o / b_sum[:, None]).to(o.dtype.element_ty)
                tl.store(p_o + o_h[:, None] * DV + o_v[None, :], b_out, mask=m_h[:, None] & (o_v < DV)[None, :])
                tl.store(state + i_out + o_h, tl.where(seen, b_m + tl.log(b_sum), float("-inf")), mask=m_h)
            else:
                p_o += o_h[:, None] * (SPLITS * DV) + o_v[None, :]
                tl.store(p_o, b_o, mask=m_h[:, None] & (o_v < DV)[None, :])
                store_state(state + (i_out * SPLITS + i_split) * W, b_m, b_z, o_h, o_w, m_h, SPLITS * W)


@triton.jit(do_not_specialize=["n_items", "n_tokens", "n_all"])
def paged_join(
    o,  # [T, N1, SPLITS, DV] float32
    state,  # [T, N1, SPLITS, W] float32, maximum and sum
    rows,  # [B, 2] int32
    out,  # [T, N1, DV]
    lse,  # [T, N1] float32
    n_items,  # B * N1
    n_tokens,
    n_all,  # T
    N1,
    SPLITS: tl.constexpr,
    W: tl.constexpr,
    RAGGED: tl.constexpr,
    BS: tl.constexpr,  # SPLITS, or the power of two above it
    BP: tl.constexpr,  # outputs that are added at once
    DV: tl.constexpr,
    BV: tl.constexpr,  # DV, or the power of two above it
):
    """The splits of each head, added in a fixed order."""
    o_s = tl.arange(0, BS)
    o_w = tl.arange(0, W)
    o_v = tl.arange(0, BV)
    o_1 = tl.arange(0, 1)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_begin, i_end, _ = query_rows(rows, i_item // N1, n_tokens, n_all, RAGGED)
        for i_t in range(i_begin, i_end):
            i_out = i_t.to(tl.int64) * N1 + i_item % N1
            p_state = state + i_out * (SPLITS * W)
            b_m, b_z = join_states(p_state, o_s, o_w, SPLITS, W)
            b_out = join_outputs(o + i_out * (SPLITS * DV), p_state, b_m, b_z, o_w, o_v, SPLITS, DV, W, BP, BV)
            tl.store(out + i_out * DV + o_v, b_out.to(out.dtype.element_ty), mask=o_v < DV)
            tl.store(lse + i_out + o_1, tl.where(b_m > NO_SCORE, b_m + tl.log(b_z), float("-inf")))
