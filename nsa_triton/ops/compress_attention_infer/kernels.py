"""Kernels of nsa_compress_attention_infer: attention over compressed tokens, block scores and the best blocks.

    s[h, i]  = scale q[t, h, :] k[i, :]                                       i = 0 .. n - 1, compressed tokens
    p[h, i]  = exp(s[h, i] - lse[h]),    out[t, h, :] = sum_i p[h, i] v[i, :]
    score[j] = sum over the heads h of a group, and u = 0 .. M + NN - 2, of  min(u + 1, NN, M + NN - 1 - u) p[h, x]
               with x = M (j + 1) - u - shift

Names: T rows of q, N1 query heads and N2 kv heads, G = N1 / N2 heads in a group, P tokens per page, M = L' / D and
NN = L / D strides per selection block and per compression window; shift is 0 for CANN's scores, 1 for true overlap.

The first kernel reads keys and values once. It cuts a sequence into splits, so that few sequences keep all cores busy,
and leaves for the second what scores need, M times smaller than the scores s: tile by tile and head by head, the sums
of exp(s - m) over the blocks, where m is the maximum of the head in that tile. Sums relative to a maximum of the tile
alone depend on nothing but the tile: equal full pages give equal sums, and ties stay ties. The second kernel joins the
splits, puts all tiles on one scale, adds the heads of the group and picks the best blocks.

Tile i holds the tokens i CUT .. (i + 1) CUT - 1 and the columns c = 0, 1, ... of the blocks first[i] + c. A block whose
tokens lie in two tiles is one of the last two that the first tile touches: those two sums, its *spill*, go to the row
of the next tile, where they are columns 0 and 1.
"""

import triton
import triton.language as tl

from nsa_triton.ops._common.primitives import (
    MASKED,
    NO_SCORE,
    column,
    is_column,
    join_outputs,
    join_states,
    page_at,
    query_rows,
    store_state,
)

FORCED: tl.constexpr = tl.constexpr(3e38)  # the score of a block that is always chosen
BEHIND: tl.constexpr = tl.constexpr(1e9)  # larger than every block number


@triton.jit
def first_block(i_token, M: tl.constexpr, SHIFT: tl.constexpr):
    """The first block that a token of a tile may belong to, when the tile begins at `i_token`; -1 for none."""
    return (i_token + SHIFT + M - 1) // M - 1


@triton.jit(do_not_specialize=["n_items", "n_tokens", "n_all", "n_table", "n_pages", "n_tiles_all"])
def compress_attention_split(
    q,  # [T, N1, DK]; with several query tokens per tile [N2, T, G, DK], so that the rows of a tile lie evenly
    k,  # [n_pages, P, N2, DK]
    v,  # [n_pages, P, N2, DV]
    table,  # [B, n_table] int32, page ids
    lengths,  # [B] int32, compressed tokens in the cache
    rows,  # [B, 2] int32, first row of q and query tokens; dead if not RAGGED
    raw_lengths,  # [B] int32, raw tokens; dead if not HIDES
    weights,  # [PHASES, BN, BC] float32, how often a token counts for a block
    o,  # [N2, T, G, SPLITS, DV] float32, not divided by the sum; if DIRECT the output itself, [T, N1, DV]
    state,  # [N2, T, G, SPLITS, W] float32, maximum and sum
    sums,  # [N2, T, G, n_tiles_all, BJ] float32, the sums of each tile's blocks
    edges,  # [N2, T, G, n_tiles_all + 1, W] float32: the spill of the tile before, and its maximum
    scale,
    n_items,
    n_tokens,  # query tokens per batch, if not RAGGED
    n_all,  # T
    n_table,
    n_pages,
    n_tiles_all,
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
    P: tl.constexpr,
    CUT: tl.constexpr,  # tokens per tile; divides P
    L: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    SHIFT: tl.constexpr,
    PHASES: tl.constexpr,  # ways in which a tile can lie to the blocks: 1 if M divides CUT
    SPLITS: tl.constexpr,
    DIRECT: tl.constexpr,  # one split, and one query token per tile
    W: tl.constexpr,
    RAGGED: tl.constexpr,
    HIDES: tl.constexpr,  # whether early query tokens may not see the last compressed token
    BQ: tl.constexpr,  # query tokens per tile
    BH: tl.constexpr,  # heads per tile
    BN: tl.constexpr,  # CUT, or the power of two above it
    BC: tl.constexpr,  # blocks that a tile may touch
    BJ: tl.constexpr,  # blocks that it may complete
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,  # DK, or the power of two above it
    BV: tl.constexpr,  # DV, or the power of two above it
):
    o_r = tl.arange(0, BQ * BH)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_c = tl.arange(0, BC)
    o_w = tl.arange(0, W)
    f_c = o_c.to(tl.float32)
    f_w = o_w.to(tl.float32)
    # [BQ * BH] the query token of each row
    b_t = ((o_r.to(tl.float32) + 0.5) / BH).to(tl.int32).to(tl.float32)
    # [BQ * BH, BN]
    b_column = tl.zeros([BQ * BH, BN], tl.float32) + o_n.to(tl.float32)[None, :]
    n_tiles_h = (G + BH - 1) // BH
    # [BN, BC]
    p_w = weights + o_n[:, None] * BC + o_c[None, :]
    b_fold = tl.load(p_w)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_split = i_item % SPLITS
        i_h = i_item // SPLITS % n_tiles_h * BH
        i_n = i_item // (SPLITS * n_tiles_h) % N2
        i_b = i_item // (SPLITS * n_tiles_h) // N2
        i_begin, i_end, i_newest = query_rows(rows, i_b, n_tokens, n_all, RAGGED)
        n_cmp = tl.minimum(tl.maximum(tl.load(lengths + i_b), 0), n_tiles_all * CUT)
        n_tail = 0
        if HIDES:
            n_tail = tl.load(raw_lengths + i_b) - ((n_cmp - 1) * D + L)
        n_tiles = (n_cmp + CUT - 1) // CUT
        p_table = table + i_b.to(tl.int64) * n_table
        for i_t in range(i_begin, i_end, BQ):
            i_row = i_t.to(tl.int64)
            # The rows of the workspace are those of the tile: tokens times heads of one group.
            i_r = (i_n.to(tl.int64) * n_all + i_row) * G + i_h
            if BQ == 1 or BH == G:
                o_ws = o_r
                m_ws = o_r < tl.minimum(i_end - i_t, BQ) * tl.minimum(G - i_h, BH)
            else:
                o_ws = o_r // BH * G + o_r % BH
                m_ws = (o_r // BH < i_end - i_t) & (o_r % BH < G - i_h)
            # [BQ * BH, BK]
            if BQ == 1:
                p_q = q + i_row * q_t + (i_n * G + i_h) * q_h + o_r[:, None] * q_h
            else:
                p_q = q + i_r * DK + o_ws[:, None] * DK
            b_q = tl.load(p_q + o_k[None, :], mask=m_ws[:, None] & (o_k < DK)[None, :], other=0.0)
            # [BQ * BH], [BQ * BH], [BQ * BH, BV]
            b_m = tl.full([BQ * BH], NO_SCORE, tl.float32)
            b_z = tl.zeros([BQ * BH], tl.float32)
            b_o = tl.zeros([BQ * BH, BV], tl.float32)
            for i_tile in range(n_tiles * i_split // SPLITS, n_tiles * (i_split + 1) // SPLITS):
                i_i = i_tile * CUT
                n_i = tl.minimum(n_cmp - i_i, CUT)
                i_page = page_at(p_table, i_i // P, n_table, n_pages)
                m_n = (o_n < n_i)[:, None]
                # [BN, BK]
                p_k = k + i_page * k_p + i_i % P * k_i + i_n * k_n
                b_k = tl.load(p_k + o_n[:, None] * k_i + o_k[None, :], mask=m_n & (o_k < DK)[None, :], other=0.0)
                # [BQ * BH, BN]
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
                b_s = tl.where(b_column < n_i * 1.0, b_s, MASKED)
                if HIDES:
                    # [BQ * BH, 1] query tokens before the last raw token, [1, BN] the last compressed token
                    b_early = tl.where((i_newest - 1 - i_t).to(tl.float32) - b_t > n_tail * 1.0, MASKED, 0.0)[:, None]
                    b_last = tl.where(o_n.to(tl.float32) == n_cmp - 1.0 - i_i, 1.0, 0.0)[None, :]
                    b_s += b_early * b_last
                b_max = tl.maximum(tl.max(b_s, axis=1), NO_SCORE, propagate_nan=tl.PropagateNan.ALL)
                b_p = tl.exp(b_s - b_max[:, None])
                # [BN, BV]
                p_v = v + i_page * v_p + i_i % P * v_i + i_n * v_n
                b_v = tl.load(p_v + o_n[:, None] * v_i + o_v[None, :], mask=m_n & (o_v < DV)[None, :], other=0.0)
                b_new = tl.maximum(b_m, b_max, propagate_nan=tl.PropagateNan.ALL)
                b_shrink = tl.exp(b_m - b_new)
                b_grow = tl.exp(b_max - b_new)
                b_z = b_z * b_shrink + tl.sum(b_p, axis=1) * b_grow
                b_w = (b_p * b_grow[:, None]).to(b_v.dtype)
                b_o = b_o * b_shrink[:, None] + tl.dot(b_w, b_v, input_precision="ieee")
                b_m = b_new
                # [BQ * BH, BC]
                if PHASES > 1:
                    i_phase = (first_block(i_i, M, SHIFT) + 1) * M - SHIFT - i_i
                    b_sums = tl.dot(b_p, tl.load(p_w + i_phase * (BN * BC)), input_precision="ieee")
                else:
                    b_sums = tl.dot(b_p, b_fold, input_precision="ieee")
                p_sums = sums + (i_r * n_tiles_all + i_tile) * BJ
                m_sums = m_ws[:, None] & (o_c < BJ)[None, :]
                tl.store(p_sums + o_ws[:, None] * (n_tiles_all * BJ) + o_c[None, :], b_sums, mask=m_sums)
                # [BQ * BH, W]
                i_spill = (first_block(i_i + CUT, M, SHIFT) - first_block(i_i, M, SHIFT)) * 1.0
                b_edge = (
                    column(b_sums, f_c, i_spill)[:, None] * is_column(f_w, 0.0)[None, :]
                    + column(b_sums, f_c, i_spill + 1.0)[:, None] * is_column(f_w, 1.0)[None, :]
                    + b_max[:, None] * is_column(f_w, 2.0)[None, :]
                )
                p_edge = edges + (i_r * (n_tiles_all + 1) + i_tile + 1) * W
                tl.store(p_edge + o_ws[:, None] * ((n_tiles_all + 1) * W) + o_w[None, :], b_edge, mask=m_ws[:, None])
            store_state(state + (i_r * SPLITS + i_split) * W, b_m, b_z, o_ws, o_w, m_ws, SPLITS * W)
            m_o = m_ws[:, None] & (o_v < DV)[None, :]
            if DIRECT:
                b_out = (b_o / tl.where(b_z > 0.0, b_z, 1.0)[:, None]).to(o.dtype.element_ty)
                p_o = o + ((i_row * N2 + i_n) * G + i_h) * DV
                tl.store(p_o + o_r[:, None] * DV + o_v[None, :], b_out, mask=m_o)
            else:
                p_o = o + (i_r * SPLITS + i_split) * DV
                tl.store(p_o + o_ws[:, None] * (SPLITS * DV) + o_v[None, :], b_o, mask=m_o)


@triton.jit
def with_spill(b_own, b_m, b_spill, b_m_spill, b_head_m):
    """Sums [BT] of one column relative to b_m, and those of the tile before relative to b_m_spill, at one scale.

    Where there is no spill, nothing depends on the tile before, so that equal tiles give equal bits. Where there is,
    the two are added at the scale of the larger maximum: equal scores, 1 and 7 times, are 8 times one.
    """
    b_max = tl.maximum(b_m, b_m_spill, propagate_nan=tl.PropagateNan.ALL)
    b_both = (b_own * tl.exp(b_m - b_max) + b_spill * tl.exp(b_m_spill - b_max)) * tl.exp(b_max - b_head_m)
    return tl.where(b_spill > 0.0, b_both, b_own * tl.exp(b_m - b_head_m))


@triton.jit
def head_sums(p_sums, p_edge, b_head_m, o_t, o_j, o_w, i_tile, n_tiles, BJ: tl.constexpr, W: tl.constexpr):
    """The block sums [BT, BJ] of one head, relative to its maximum, for tiles i_tile, i_tile + 1, ...

    The row behind the last tile holds what that one spills.
    """
    f_j = o_j.to(tl.float32)
    f_w = o_w.to(tl.float32)
    m_own = (o_t < n_tiles - i_tile)[:, None]
    m_before = ((o_t >= 1 - i_tile) & (o_t < n_tiles + 1 - i_tile))[:, None]
    # [BT, BJ]
    b_own = tl.load(p_sums + o_t[:, None] * BJ + o_j[None, :], mask=m_own, other=0.0)
    # [BT, W]
    b_edge = tl.load(p_edge + W + o_t[:, None] * W + o_w[None, :], mask=m_own, other=NO_SCORE)
    b_spill = tl.load(p_edge + o_t[:, None] * W + o_w[None, :], mask=m_before, other=NO_SCORE)
    # [BT]
    b_m = column(b_edge, f_w, 2.0)
    b_m_spill = column(b_spill, f_w, 2.0)
    b_0 = with_spill(column(b_own, f_j, 0.0), b_m, column(b_spill, f_w, 0.0), b_m_spill, b_head_m)
    b_1 = with_spill(column(b_own, f_j, 1.0), b_m, column(b_spill, f_w, 1.0), b_m_spill, b_head_m)
    b_x = b_own * tl.exp(b_m - b_head_m)[:, None] * tl.where(f_j < 2.0, 0.0, 1.0)[None, :]
    return b_x + b_0[:, None] * is_column(f_j, 0.0)[None, :] + b_1[:, None] * is_column(f_j, 1.0)[None, :]


@triton.jit
def first_largest(b_x, b_id):
    """The largest of scores [C], and the lowest of the ids [C] that have it."""
    s_x = tl.max(b_x, axis=0)
    return s_x, tl.min(tl.where(b_x == s_x, b_id, BEHIND), axis=0)


@triton.jit(do_not_specialize=["n_items", "n_tokens", "n_all", "n_tiles_all"])
def compress_attention_choose(
    o,  # [N2, T, G, SPLITS, DV] float32
    state,  # [N2, T, G, SPLITS, W] float32, maximum and sum
    sums,  # [N2, T, G, n_tiles_all, BJ] float32
    edges,  # [N2, T, G, n_tiles_all + 1, W] float32
    firsts,  # [*] float32, the first block of each tile
    lengths,  # [B] int32
    rows,  # [B, 2] int32
    raw_lengths,  # [B] int32, raw tokens; dead if not OWN
    out,  # [T, N1, DV]
    ids,  # [T, N2, K] int32
    n_items,  # B * N2
    n_tokens,
    n_all,
    n_tiles_all,
    N2,
    G: tl.constexpr,
    K: tl.constexpr,
    CUT: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # L', raw tokens per selection block
    INIT: tl.constexpr,  # first blocks that are always chosen
    LOCAL: tl.constexpr,  # last blocks that are always chosen
    OWN: tl.constexpr,  # whether the last block is that of the query token, or the last that windows touch
    SPLITS: tl.constexpr,
    DIRECT: tl.constexpr,
    W: tl.constexpr,
    RAGGED: tl.constexpr,
    BS: tl.constexpr,  # SPLITS, or the power of two above it
    BP: tl.constexpr,  # outputs of splits that are added at once
    BJ: tl.constexpr,
    BT: tl.constexpr,  # tiles whose blocks are looked at at once
    CHUNKED: tl.constexpr,  # whether a sequence may have more
    BC: tl.constexpr,  # K, or the power of two above it
    DV: tl.constexpr,
    BV: tl.constexpr,
):
    o_s = tl.arange(0, BS)
    o_w = tl.arange(0, W)
    o_v = tl.arange(0, BV)
    o_t = tl.arange(0, BT)
    o_j = tl.arange(0, BJ)
    o_c = tl.arange(0, BC)
    f_t = o_t.to(tl.float32)
    f_c = o_c.to(tl.float32)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_n = i_item % N2
        i_b = i_item // N2
        i_begin, i_end, i_newest = query_rows(rows, i_b, n_tokens, n_all, RAGGED)
        n_cmp = tl.minimum(tl.maximum(tl.load(lengths + i_b), 0), n_tiles_all * CUT)
        n_tiles = (n_cmp + CUT - 1) // CUT
        n_touched = tl.where(n_cmp > 0, ((n_cmp - 1) * D + L + BLOCK - 1) // BLOCK, 0)
        for i_t in range(i_begin, i_end):
            i_row = i_t.to(tl.int64)
            n_blocks = n_touched
            if OWN:
                n_seen = tl.load(raw_lengths + i_b) - (i_newest - 1 - i_t).to(tl.int32)
                n_blocks = (n_seen + BLOCK - 1) // BLOCK
            i_r = (i_n.to(tl.int64) * n_all + i_row) * G
            for i_g in range(0, 0 if DIRECT else G):
                p_state = state + (i_r + i_g) * (SPLITS * W)
                b_m, b_z = join_states(p_state, o_s, o_w, SPLITS, W)
                p_o = o + (i_r + i_g) * (SPLITS * DV)
                b_out = join_outputs(p_o, p_state, b_m, b_z, o_w, o_v, SPLITS, DV, W, BP, BV)
                p_out = out + ((i_row * N2 + i_n) * G + i_g) * DV
                tl.store(p_out + o_v, b_out.to(out.dtype.element_ty), mask=o_v < DV)

            # [BC] the best blocks so far, descending: scores and ids
            b_best = tl.full([BC], -1.0, tl.float32)
            b_ids = tl.full([BC], -1.0, tl.float32)
            for i_tile in range(0, n_tiles + 1, BT):
                # [BT, BJ]
                b_x = tl.zeros([BT, BJ], tl.float32)
                for i_g in range(0, G):
                    b_m, b_z = join_states(state + (i_r + i_g) * (SPLITS * W), o_s, o_w, SPLITS, W)
                    p_sums = sums + ((i_r + i_g) * n_tiles_all + i_tile) * BJ
                    p_edge = edges + ((i_r + i_g) * (n_tiles_all + 1) + i_tile) * W
                    b_head = head_sums(p_sums, p_edge, b_m, o_t, o_j, o_w, i_tile, n_tiles, BJ, W)
                    b_x += b_head / b_z[:, None]
                # [BT, BJ] ids; columns behind those of a tile belong to the next, the row behind the last tile has all
                b_first = tl.load(firsts + i_tile + o_t)
                b_next = tl.load(firsts + i_tile + 1 + o_t)
                b_next = tl.where(f_t < (n_tiles - i_tile) * 1.0, b_next, n_blocks * 1.0)
                b_next = tl.where(f_t < (n_tiles + 1 - i_tile) * 1.0, b_next, -1.0)
                b_id = b_first[:, None] + o_j.to(tl.float32)[None, :]
                b_x = tl.where(b_x >= 0.0, b_x, 0.0)  # NaN
                b_x = tl.where(b_id < INIT, FORCED, b_x)
                b_x = tl.where(b_id >= n_blocks * 1.0 - LOCAL, FORCED, b_x)
                b_x = tl.where(b_id >= 0.0, b_x, -1.0)
                b_x = tl.where(b_id < tl.minimum(b_next, n_blocks * 1.0)[:, None], b_x, -1.0)

                # [BT * BJ]
                b_x = tl.reshape(b_x, [BT * BJ])
                b_id = tl.reshape(b_id, [BT * BJ])
                # Another name for b_best would share its buffer, which is that of b_new too: see CONTRIBUTING.md.
                b_old = tl.maximum(b_best, -1.0, tl.PropagateNan.ALL)
                b_new = tl.full([BC], -1.0, tl.float32)
                b_new_ids = tl.full([BC], -1.0, tl.float32)
                for i_k in range(0, K):
                    s_x, s_id = first_largest(b_x, b_id)
                    if CHUNKED:
                        s_old, s_old_id = first_largest(b_old, b_ids)
                        s_id = tl.where(s_old >= s_x, s_old_id, s_id)  # of equal scores the old one has the lower id
                        s_x = tl.where(s_old >= s_x, s_old, s_x)
                        b_old = tl.where(b_ids == s_id, -1.0, b_old)
                        b_new = tl.where(f_c == i_k * 1.0, s_x, b_new)
                    b_x = tl.where(b_id == s_id, -1.0, b_x)
                    b_new_ids = tl.where(f_c == i_k * 1.0, tl.where(s_x >= 0.0, s_id, -1.0), b_new_ids)
                b_best = b_new
                b_ids = b_new_ids
            p_ids = ids + (i_row * N2 + i_n) * K
            tl.store(p_ids + o_c, b_ids.to(tl.int32), mask=o_c < K)
