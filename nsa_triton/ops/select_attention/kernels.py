"""Kernels of nsa_select_attention: attention of every query token over the blocks of keys that it chose, and gradients.

    s[r, i] = scale q[r, :] k[i, :]        over the tokens i of the chosen blocks b, each chosen c[r, b] times
    p[r, i] = c[r, b] exp(s[r, i] - lse[r]),      out[r, :] = sum_i p[r, i] v[i, :]
    ds[r, i] = p[r, i] (g[r, :] v[i, :] - delta[r]),     delta[r] = sum_d g[r, d] out[r, d]
    dq[r, :] = scale sum_i ds[r, i] k[i, :]
    dk[i, :] = scale sum_r ds[r, i] q[r, :],      dv[i, :] = sum_r p[r, i] g[r, :]

Names: T rows of q, N1 query heads and N2 kv heads, G = N1 / N2 heads in the group of one kv head, K ids per token, L
tokens per block. A tile is PACK adjacent tokens of one segment times BH heads of a group: its rows r. Its entries are
the E = PACK * K ids of its tokens. They often name the same blocks, so a first kernel makes their *union*; every block
of it is loaded once for all rows of the tile, and rows that did not choose it do not see it. A block that is too long
for a tile is cut into pieces of CUT tokens.

q, g, out and what belongs to their rows lie in *row order*: [T, N2, G], or [N2, T, G] if a tile has several tokens,
so that its rows are neighbours. The row of the first head of kv head n and token t is n r_n + t r_t.

Which blocks the tiles hold, and which tiles hold a block, is made by list_kernels.py. The list of a block is cut into
parts where it is long, whose sums a last kernel adds in order. No atomics: the same inputs give the same bits.
"""

import triton
import triton.language as tl

from nsa_triton.ops._common.primitives import MASKED, NO_SCORE, is_column, load_rows, weights_and_slopes

NOTHING: tl.constexpr = tl.constexpr(3e38)  # the log-sum-exp of a row that saw nothing: exp(s - it) = 0
BEHIND: tl.constexpr = tl.constexpr(1e9)  # larger than every place in a segment
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


# ---- what the kernels with products share ----


@triton.jit
def tile_rows(i_tile_h, G, PACK: tl.constexpr, BH: tl.constexpr, n_t):
    """The first head of a tile and its rows: those of n_t tokens, or of the last heads of a group."""
    i_h = i_tile_h * BH
    return i_h, tl.minimum(n_t * BH, n_t * G - i_h)


@triton.jit
def ids_of_tokens(p_ids, o_p, o_i, n_t, K: tl.constexpr):
    """[BP, BI] the ids of the tokens of a tile, as float32; -1 where there are none."""
    m_i = (o_p < n_t)[:, None] & (o_i < K)[None, :]
    return tl.load(p_ids + o_p[:, None] * K + o_i[None, :], mask=m_i, other=-1).to(tl.float32)


@triton.jit
def token_of_rows(o_r, o_p, BH: tl.constexpr):
    """[BR] the number of the token of each row within its tile, and [BP, BR] 1.0 where a row is one of a token."""
    b_t = ((o_r.to(tl.float32) + 0.5) / BH).to(tl.int32).to(tl.float32)
    return b_t, is_column(o_p.to(tl.float32)[:, None], b_t[None, :])


@triton.jit
def tokens_seen(i_t, b_t, n_k, CAUSAL: tl.constexpr):
    """How many tokens of its segment each row may see; i_t is the place of the first of them.

    A minimum of vectors in any case: a value that is the same in all rows would go through memory to the cube cores,
    which would then wait for the vector cores in every round.
    """
    i_see = (i_t + 1) * 1.0 if CAUSAL else BEHIND
    return tl.minimum(b_t + i_see, n_k * 1.0, tl.PropagateNan.ALL)


@triton.jit
def log_of_times(b_ids, b_of, i_block):
    """[BR] the logarithm of how often the token of each row chose a block, which is added to its scores. Where it did
    not, no probability is left; the vector unit's logarithm of 0 is not defined.

    Counted by tokens, then handed to their rows: comparing each row with its ids makes the loop 1.1 times as long.
    """
    b_times = tl.sum(tl.where(b_ids == i_block * 1.0, 1.0, 0.0), axis=1)
    b_times = tl.sum(b_of * b_times[:, None], axis=0)
    return tl.where(b_times > 0.0, tl.log(tl.maximum(b_times, 1.0, tl.PropagateNan.ALL)), MASKED)


@triton.jit
def cuts_off(n_0, i_t, i_key, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether some of BN keys from i_key on, of which n_0 are there, are not seen by the query token i_t."""
    if CAUSAL:
        return (n_0 < BN) | (i_t + 1 < i_key + BN)
    return n_0 < BN


@triton.jit
def piece(i_block, i_cut, n_k, L: tl.constexpr, CUT: tl.constexpr):
    """The first token of a piece of a block, and its tokens, which may be 0 or less behind the end of the segment."""
    i_0 = i_block * L + i_cut * CUT
    return i_0, tl.minimum(CUT, n_k - i_0)


@triton.jit(do_not_specialize=["n_items", "n_tiles", "n_all", "r_t", "r_n"])
def select_attention_fwd(
    q,  # [rows, DK]
    k,  # [T2, N2, DK]
    v,  # [T2, N2, DV]
    ids,  # [N2, T, K] int32
    union,  # [N2, n_tiles, U] int32
    tiles,  # [n_tiles, 6]
    o,  # [rows, DV]
    m,  # [rows, W] float32, the maximum W times
    z,  # [rows, W] float32, the sum W times
    scale,
    n_items,
    n_tiles,
    n_all,  # T
    r_t,  # strides
    r_n,
    k_t,
    k_n,
    v_t,
    v_n,
    G: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    CUT: tl.constexpr,  # divides L
    PACK: tl.constexpr,
    E: tl.constexpr,
    U: tl.constexpr,
    W: tl.constexpr,
    CAUSAL: tl.constexpr,
    BH: tl.constexpr,  # heads per tile; G if PACK > 1
    BP: tl.constexpr,  # PACK, or the power of two above it
    BR: tl.constexpr,  # PACK * BH, or more
    BN: tl.constexpr,  # CUT, or the power of two above it
    BI: tl.constexpr,  # K, or the power of two above it
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,  # DK, or the power of two above it
    BV: tl.constexpr,  # DV, or the power of two above it
):
    o_p = tl.arange(0, BP)
    o_r = tl.arange(0, BR)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_i = tl.arange(0, BI)
    o_w = tl.arange(0, W)
    b_t, b_of = token_of_rows(o_r, o_p, BH)
    f_n = o_n.to(tl.float32)
    HEADS: tl.constexpr = (G + BH - 1) // BH
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_tile = i_item // HEADS % n_tiles
        i_n = (i_item // (HEADS * n_tiles)).to(tl.int64)
        p_tile = tiles + i_tile * 6
        i_q = tl.load(p_tile).to(tl.int64)
        n_t = tl.load(p_tile + 2)
        i_k = tl.load(p_tile + 4).to(tl.int64)
        n_k = tl.load(p_tile + 5)
        i_h, n_r = tile_rows(i_item % HEADS, G, PACK, BH, n_t)
        i_row = i_n * r_n + i_q * r_t + i_h
        i_t = tl.load(p_tile + 1)
        # [BP, BI]
        b_ids = ids_of_tokens(ids + (i_n * n_all + i_q) * K, o_p, o_i, n_t, K)
        # [BR, BK]
        m_r = (o_r < n_r)[:, None]
        b_q = load_rows(q + i_row * DK, o_r, o_k, DK, n_r, DK)
        # [BR], [BR], [BR, BV]
        b_m = tl.full([BR], NO_SCORE, tl.float32)
        b_z = tl.zeros([BR], tl.float32)
        b_o = tl.zeros([BR, BV], tl.float32)
        p_union = union + (i_n * n_tiles + i_tile) * U
        for i_piece in range(0, tl.load(p_union + E) * (L // CUT)):
            i_block = tl.load(p_union + i_piece // (L // CUT))
            i_0, n_0 = piece(i_block, i_piece % (L // CUT), n_k, L, CUT)
            i_i = i_k + tl.minimum(i_0, n_k - 1)
            # [BR]
            b_log = log_of_times(b_ids, b_of, i_block)
            # [BN, BK]; one row at least, because a product of no columns is none
            b_k = load_rows(k + i_i * k_t + i_n * k_n, o_n, o_k, k_t, tl.maximum(n_0, 1), DK)
            # [BR, BN]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            if cuts_off(n_0, i_t, i_0, BN, CAUSAL):
                b_seen = tokens_seen(i_t, b_t, n_k, CAUSAL) - i_0 * 1.0
                b_s = tl.where(f_n[None, :] < b_seen[:, None], b_s, MASKED)
            # scores of a row that did not choose the block are not for its maximum
            b_only = tl.minimum(b_log, 0.0, tl.PropagateNan.ALL)
            b_max = tl.maximum(b_m, tl.max(b_s, axis=1) + b_only, propagate_nan=tl.PropagateNan.ALL)
            b_p = tl.exp(b_s - (b_max - b_log)[:, None])
            # [BN, BV]
            b_v = load_rows(v + i_i * v_t + i_n * v_n, o_n, o_v, v_t, n_0, DV)
            b_shrink = tl.exp(b_m - b_max)
            b_z = b_z * b_shrink + tl.sum(b_p, axis=1)
            b_o = b_o * b_shrink[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
            b_m = b_max
        saw_nothing = b_m <= NO_SCORE
        b_out = (b_o / tl.where(saw_nothing, 1.0, b_z)[:, None]).to(o.dtype.element_ty)
        tl.store(o + i_row * DV + o_r[:, None] * DV + o_v[None, :], b_out, mask=m_r & (o_v < DV)[None, :])
        b_m = tl.where(saw_nothing, LOWEST, b_m)
        # [BR, W]
        o_mz = i_row * W + o_r[:, None] * W + o_w[None, :]
        tl.store(m + o_mz, tl.broadcast_to(b_m[:, None], [BR, W]), mask=m_r & (o_w < W)[None, :])
        tl.store(z + o_mz, tl.broadcast_to(b_z[:, None], [BR, W]), mask=m_r & (o_w < W)[None, :])


# ---- the gradient of q ----


@triton.jit(do_not_specialize=["n_rows"])
def select_attention_terms(
    g,  # [rows, DV]
    out,  # [rows, DV]
    m,  # [rows] float32
    z,  # [rows] float32
    lse,  # [rows] float32
    delta,  # [rows] float32
    n_rows,
    DV: tl.constexpr,
    BM: tl.constexpr,  # rows per tile
    BV: tl.constexpr,
):
    """What the gradient of a softmax needs of each row: its log-sum-exp, and the sum of gradient times output."""
    o_m = tl.arange(0, BM)
    o_v = tl.arange(0, BV)
    for i_m in range(tl.program_id(0) * BM, n_rows, tl.num_programs(0) * BM):
        # [BM, BV]
        m_g = (o_m < n_rows - i_m)[:, None] & (o_v < DV)[None, :]
        o_g = i_m.to(tl.int64) * DV + o_m[:, None] * DV + o_v[None, :]
        b_g = tl.load(g + o_g, mask=m_g, other=0.0).to(tl.float32)
        b_out = tl.load(out + o_g, mask=m_g, other=0.0).to(tl.float32)
        tl.store(delta + i_m + o_m, tl.sum(b_g * b_out, axis=1), mask=o_m < n_rows - i_m)
        # [BM]
        b_m = tl.load(m + i_m + o_m, mask=o_m < n_rows - i_m, other=0.0)
        b_z = tl.load(z + i_m + o_m, mask=o_m < n_rows - i_m, other=1.0)
        b_lse = tl.where(b_z == 0.0, NOTHING, b_m + tl.log(tl.where(b_z == 0.0, 1.0, b_z)))
        tl.store(lse + i_m + o_m, b_lse, mask=o_m < n_rows - i_m)


@triton.jit(do_not_specialize=["n_items", "n_tiles", "n_all", "r_t", "r_n"])
def select_attention_dq(
    q,  # [rows, DK]
    g,  # [rows, DV]
    k,  # [T2, N2, DK]
    v,  # [T2, N2, DV]
    lse,  # [rows] float32
    delta,  # [rows] float32
    ids,  # [N2, T, K] int32
    union,  # [N2, n_tiles, U] int32
    tiles,  # [n_tiles, 6]
    dq,  # [rows, DK]
    scale,
    n_items,
    n_tiles,
    n_all,  # T
    r_t,  # strides
    r_n,
    k_t,
    k_n,
    v_t,
    v_n,
    G: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    CUT: tl.constexpr,
    PACK: tl.constexpr,
    E: tl.constexpr,
    U: tl.constexpr,
    CAUSAL: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BI: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    o_p = tl.arange(0, BP)
    o_r = tl.arange(0, BR)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_i = tl.arange(0, BI)
    b_t, b_of = token_of_rows(o_r, o_p, BH)
    f_n = o_n.to(tl.float32)
    HEADS: tl.constexpr = (G + BH - 1) // BH
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_tile = i_item // HEADS % n_tiles
        i_n = (i_item // (HEADS * n_tiles)).to(tl.int64)
        p_tile = tiles + i_tile * 6
        i_q = tl.load(p_tile).to(tl.int64)
        n_t = tl.load(p_tile + 2)
        i_k = tl.load(p_tile + 4).to(tl.int64)
        n_k = tl.load(p_tile + 5)
        i_h, n_r = tile_rows(i_item % HEADS, G, PACK, BH, n_t)
        i_row = i_n * r_n + i_q * r_t + i_h
        i_t = tl.load(p_tile + 1)
        # [BP, BI]
        b_ids = ids_of_tokens(ids + (i_n * n_all + i_q) * K, o_p, o_i, n_t, K)
        # [BR]
        b_lse = tl.load(lse + i_row + o_r, mask=o_r < n_r, other=NOTHING)
        b_delta = tl.load(delta + i_row + o_r, mask=o_r < n_r, other=0.0)
        # [BR, BK], [BR, BV]
        m_r = (o_r < n_r)[:, None]
        b_q = load_rows(q + i_row * DK, o_r, o_k, DK, n_r, DK)
        b_g = load_rows(g + i_row * DV, o_r, o_v, DV, n_r, DV)
        # [BR, BK]
        b_dq = tl.zeros([BR, BK], tl.float32)
        p_union = union + (i_n * n_tiles + i_tile) * U
        n_found = tl.load(p_union + E)
        # One round at least, if need be of a block that no row chose: a sum of products alone begins in the first
        # round, and without one it is whatever the cube's memory held.
        for i_piece in range(0, tl.maximum(n_found, 1) * (L // CUT)):
            i_block = tl.where(n_found > 0, tl.load(p_union + i_piece // (L // CUT)), 0)
            i_0, n_0 = piece(i_block, i_piece % (L // CUT), n_k, L, CUT)
            i_i = i_k + tl.minimum(i_0, n_k - 1)
            # [BR]
            b_log = log_of_times(b_ids, b_of, i_block)
            # [BN, BK], [BN, BV]; one row at least
            n_some = tl.maximum(n_0, 1)
            b_k = load_rows(k + i_i * k_t + i_n * k_n, o_n, o_k, k_t, n_some, DK)
            b_v = load_rows(v + i_i * v_t + i_n * v_n, o_n, o_v, v_t, n_some, DV)
            # [BR, BN]
            b_p, b_slope = weights_and_slopes(b_q, b_k, b_g, b_v, (b_lse - b_log)[:, None], b_delta[:, None], scale)
            b_ds = b_p * b_slope
            if cuts_off(n_0, i_t, i_0, BN, CAUSAL):
                m_seen = f_n[None, :] < (tokens_seen(i_t, b_t, n_k, CAUSAL) - i_0 * 1.0)[:, None]
                b_ds = tl.where(m_seen, b_ds, 0.0)
            b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
        b_out = (b_dq * scale).to(dq.dtype.element_ty)
        tl.store(dq + i_row * DK + o_r[:, None] * DK + o_k[None, :], b_out, mask=m_r & (o_k < DK)[None, :])


# ---- the gradients of k and v ----


@triton.jit(do_not_specialize=["n_rows", "n_blocks", "n_all", "r_t", "r_n"])
def select_attention_dkv(
    q,  # [rows, DK]
    g,  # [rows, DV]
    k,  # [T2, N2, DK]
    v,  # [T2, N2, DV]
    lse,  # [rows] float32
    delta,  # [rows] float32
    ids,  # [N2, T, K] int32
    blocks,  # [n_blocks, 6], see key_tiles
    places,  # [n_rows + 1] int32
    parts,  # [n_rows + 1] int32
    entries,  # [*] int32, the place of the first token of each tile
    rows,  # [*] int32, the row of each part
    most,  # [8] int32, how many entries of a list make one part
    dk,  # [*, L, DK] float32, of each part
    dv,  # [*, L, DV] float32
    scale,
    n_rows,  # N2 * n_blocks
    n_blocks,
    n_all,  # T
    r_t,  # strides
    r_n,
    k_t,
    k_n,
    v_t,
    v_n,
    G: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    CUT: tl.constexpr,
    PACK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BI: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    o_p = tl.arange(0, BP)
    o_r = tl.arange(0, BR)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_i = tl.arange(0, BI)
    f_r = o_r.to(tl.float32)
    b_t, b_of = token_of_rows(o_r, o_p, BH)
    f_n = o_n.to(tl.float32)
    HEADS: tl.constexpr = (G + BH - 1) // BH
    CUTS: tl.constexpr = L // CUT
    n_most = tl.load(most)
    for i_item in range(tl.program_id(0), tl.load(parts + n_rows) * CUTS, tl.num_programs(0)):
        i_part = i_item // CUTS
        i_0 = i_item % CUTS * CUT
        i_list = tl.load(rows + i_part)
        i_n = (i_list // n_blocks).to(tl.int64)
        p_block = blocks + i_list % n_blocks * 6
        i_k = tl.load(p_block).to(tl.int64) + i_0
        i_pos = tl.load(p_block + 1)
        i_block = i_pos // L
        n_0 = tl.load(p_block + 2) - i_0
        n_k = tl.load(p_block + 3)
        i_begin = tl.load(places + i_list) + (i_part - tl.load(parts + i_list)) * n_most
        i_end = tl.minimum(i_begin + n_most, tl.load(places + i_list + 1))
        i_query = tl.load(p_block + 4).to(tl.int64)
        n_query = tl.load(p_block + 5)
        # [BN, BK], [BN, BV]; one row at least
        i_i = i_k + tl.minimum(n_0 - 1, 0)
        n_some = tl.maximum(n_0, 1)
        b_k = load_rows(k + i_i * k_t + i_n * k_n, o_n, o_k, k_t, n_some, DK)
        b_v = load_rows(v + i_i * v_t + i_n * v_n, o_n, o_v, v_t, n_some, DV)
        # [BN, BK], [BN, BV]
        b_dk = tl.zeros([BN, BK], tl.float32)
        b_dv = tl.zeros([BN, BV], tl.float32)
        # from 0 on: ascendnpu-ir 1.0.0 does not survive products in a loop whose first round is known at run time only
        for i_entry in range(0, (i_end - i_begin) * HEADS):
            # all that is loaded of a tile is its place, for each load of a scalar makes everything wait
            i_t = tl.load(entries + i_begin + i_entry // HEADS)
            i_q = i_query + i_t
            n_t = tl.minimum(PACK, n_query - i_t)
            i_h, n_r = tile_rows(i_entry % HEADS, G, PACK, BH, n_t)
            i_row = i_n * r_n + i_q * r_t + i_h
            # [BP, BI] -> [BR]
            b_ids = ids_of_tokens(ids + (i_n * n_all + i_q) * K, o_p, o_i, n_t, K)
            b_log = log_of_times(b_ids, b_of, i_block)
            b_lse = tl.load(lse + i_row + o_r, mask=o_r < n_r, other=NOTHING)
            b_delta = tl.load(delta + i_row + o_r, mask=o_r < n_r, other=0.0)
            # [BR, BK], [BR, BV]
            b_q = load_rows(q + i_row * DK, o_r, o_k, DK, n_r, DK)
            b_g = load_rows(g + i_row * DV, o_r, o_v, DV, n_r, DV)
            # [BN, BR]
            b_p, b_slope = weights_and_slopes(b_k, b_q, b_v, b_g, (b_lse - b_log)[None, :], b_delta[None, :], scale)
            b_ds = b_p * b_slope
            # Of rows that are not there the products are whatever the cube's memory held.
            if cuts_off(n_0, i_t, i_pos + i_0, BN, CAUSAL) | (n_r < BR):
                b_seen = tokens_seen(i_t, b_t, n_k, CAUSAL) - (i_pos + i_0) * 1.0
                m_seen = f_n[:, None] < tl.where(f_r < n_r * 1.0, b_seen, 0.0)[None, :]
                b_p = tl.where(m_seen, b_p, 0.0)
                b_ds = tl.where(m_seen, b_ds, 0.0)
            b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision="ieee")
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision="ieee")
        p_dk = dk + (i_part.to(tl.int64) * L + i_0) * DK
        tl.store(p_dk + o_n[:, None] * DK + o_k[None, :], b_dk, mask=(o_n < CUT)[:, None] & (o_k < DK)[None, :])
        p_dv = dv + (i_part.to(tl.int64) * L + i_0) * DV
        tl.store(p_dv + o_n[:, None] * DV + o_v[None, :], b_dv, mask=(o_n < CUT)[:, None] & (o_v < DV)[None, :])


@triton.jit(do_not_specialize=["n_items", "n_blocks", "N2"])
def select_attention_sum(
    of_parts,  # [*, L, D] float32
    parts,  # [N2 * n_blocks + 1] int32
    blocks,  # [n_blocks, 6]
    out,  # [T2, N2, D]
    scale,
    n_items,  # N2 * n_blocks * ceil(L / BM)
    n_blocks,
    N2,
    L: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,  # tokens per tile
    BD: tl.constexpr,  # D, or the power of two above it
):
    """The parts of each block, added in order and scaled; zeros for a block that nobody chose."""
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    TILES: tl.constexpr = (L + BM - 1) // BM
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_list = i_item // TILES
        i_m = i_item % TILES * BM
        p_block = blocks + i_list % n_blocks * 6
        n_m = tl.load(p_block + 2) - i_m
        m_m = (o_m < n_m)[:, None] & (o_d < D)[None, :]
        # [BM, BD]
        b_sum = tl.zeros([BM, BD], tl.float32)
        for i_part in range(tl.load(parts + i_list), tl.load(parts + i_list + 1)):
            p_part = of_parts + (i_part.to(tl.int64) * L + i_m) * D
            b_sum += tl.load(p_part + o_m[:, None] * D + o_d[None, :], mask=m_m, other=0.0)
        p_out = out + ((tl.load(p_block).to(tl.int64) + i_m) * N2 + i_list // n_blocks) * D
        tl.store(p_out + o_m[:, None] * (N2 * D) + o_d[None, :], (b_sum * scale).to(out.dtype.element_ty), mask=m_m)
