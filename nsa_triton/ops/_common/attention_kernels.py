"""Kernels of attention over keys that lie in the order of the query tokens, with gradients: over compressed tokens, and
over the newest tokens of a sliding window.

    s[t, h, i] = scale q[t, h, :] k[i, :]                             i: the keys that query token t sees
    p[t, h, i] = exp(s[t, h, i] - lse[t, h]),    out[t, h, :] = sum_i p[t, h, i] v[i, :]

Names: T query tokens and S keys of all segments; N1 query heads, N2 kv heads, G = N1 / N2 heads in a group. A key
stands for L raw tokens, and two of them are D raw tokens apart. With CAUSAL, the query token at position t of a segment
sees the keys that end at t or before, i D + L - 1 <= t. With SLIDES too, where L = D = 1, it sees the last `window` of
these.

The rows of a tile are BQ query tokens of one head. Tiles of keys that no row sees are not visited, and only those that
some rows see, and others do not, are masked: behind a branch in the loop, because a second loop would need its own
on-chip memory, and the first then has smaller tiles.
"""

import triton
import triton.language as tl

from nsa_triton.ops._common.primitives import MASKED, NO_SCORE, load_rows, softmax_step, weights_and_slopes

NOTHING: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # the maximum of a row that sees nothing
NEVER: tl.constexpr = tl.constexpr(3e38)  # its log-sum-exp: exp(s - NEVER) is 0 for every s
EMPTY: tl.constexpr = tl.constexpr(float("-inf"))  # what is said of it to others


@triton.jit
def query_tile(tiles, i_tile):
    """Of a tile of query tokens: first row of q; position of the first token, and tokens, of the tile; tokens of the
    segment; first row of k and keys of the segment."""
    p_tile = tiles + i_tile * 6
    i_row = tl.load(p_tile).to(tl.int64)
    i_key = tl.load(p_tile + 4).to(tl.int64)
    return i_row, tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3), i_key, tl.load(p_tile + 5)


@triton.jit
def seen_by(i_t, n_key, L: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr):
    """How many of n_key keys the query token at position i_t sees, if there is no window."""
    if CAUSAL:
        return tl.minimum(tl.maximum(i_t - L + 1 + D, 0) // D, n_key)
    return n_key


@triton.jit
def seen_by_rows(o_q, i_t, n_key, L: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr):
    """The same, [BQ] float32, for the query tokens from i_t on; o_q are their numbers 0, 1, ... as float32.

    Only the small remainder is divided as float32, so that long sequences stay exact.
    """
    if CAUSAL:
        WINDOWS: tl.constexpr = (L + D - 1) // D  # makes the number below positive
        i_behind = i_t - L + 1 + D + WINDOWS * D
        b_more = ((o_q + (i_behind % D + 0.5)) / D).to(tl.int32).to(tl.float32)
        b_seen = b_more + (i_behind // D - WINDOWS) * 1.0
        b_seen = tl.maximum(b_seen, 0.0, tl.PropagateNan.ALL)
        return tl.minimum(b_seen, n_key * 1.0, tl.PropagateNan.ALL)
    return o_q * 0.0 + n_key * 1.0


@triton.jit
def sight(i_t, n_t, n_key, window, L: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, SLIDES: tl.constexpr):
    """The keys that some of the n_t query tokens from position i_t on see, from the first to behind the last; and those
    that all of them see, likewise."""
    n_some = seen_by(i_t + n_t - 1, n_key, L, D, CAUSAL)
    n_shared = seen_by(i_t, n_key, L, D, CAUSAL)
    i_some, i_shared = 0, 0
    if SLIDES:
        i_some = tl.maximum(i_t - (window - 1), 0)
        i_shared = i_t + n_t - window
    return i_some, n_some, i_shared, n_shared


@triton.jit
def sees(b_column, b_ahead, b_seen, i_t, i_i, window, SLIDES: tl.constexpr):
    """[BQ, BN] whether each query token from position i_t on sees each key from i_i on."""
    if SLIDES:
        return (b_ahead > (i_t - i_i - window) * 1.0) & (b_ahead <= (i_t - i_i) * 1.0)
    return b_column < (b_seen - i_i * 1.0)[:, None]


@triton.jit
def hidden(mask, i_t, i_i, o_q, o_n, n_t, n_end, m_t):
    """[BQ, BN] float32, not 0 where the mask hides a key from a query token."""
    p_mask = mask + i_t.to(tl.int64) * m_t + i_i
    return load_rows(p_mask, o_q, o_n, m_t, n_t, n_end - i_i).to(tl.float32)


@triton.jit(do_not_specialize=["scale", "n_items", "m_t", "window"])
def attention_fwd(
    q,  # [T, N1, DK]
    k,  # [S, N2, DK]
    v,  # [S, N2, DV]
    mask,  # [most query tokens, most keys] uint8, not 0 where hidden; dead if not HIDES
    tiles,  # [*, 6] int32
    o,  # [T, N1, DV]
    o_max,  # [T * N1 * W] float32: [N1, query tokens, W] of each segment; dead if W is 0
    o_sum,  # the same
    lse,  # [N1, T] float32
    scale,
    n_items,
    N1,
    T,
    q_t,  # strides
    q_h,
    k_t,
    k_n,
    v_t,
    v_n,
    m_t,
    window,  # dead if not SLIDES
    G: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    SLIDES: tl.constexpr,
    HIDES: tl.constexpr,
    W: tl.constexpr,  # numbers to a statistic; 0: the log-sum-exp is the only result beside o
    BQ: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    o_q = tl.arange(0, BQ)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    # [BQ, BN] numbers of keys; their differences to those of query tokens
    b_column = tl.zeros([BQ, BN], tl.float32) + o_n.to(tl.float32)[None, :]
    b_ahead = b_column - o_q.to(tl.float32)[:, None]
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_h = i_item % N1
        i_n = i_h // G
        i_row, i_t, n_t, n_all, i_key, n_key = query_tile(tiles, i_item // N1)
        # [BQ, BK]
        b_q = load_rows(q + i_row * q_t + i_h * q_h, o_q, o_k, q_t, n_t, DK)
        p_k = k + i_key * k_t + i_n * k_n
        p_v = v + i_key * v_t + i_n * v_n
        # [BQ], [BQ], [BQ, BV]
        b_m = tl.full([BQ], NO_SCORE, tl.float32)
        b_z = tl.zeros([BQ], tl.float32)
        b_o = tl.zeros([BQ, BV], tl.float32)
        i_first, n_end, i_shared, n_shared = sight(i_t, n_t, n_key, window, L, D, CAUSAL, SLIDES)
        # [BQ]
        b_seen = seen_by_rows(o_q.to(tl.float32), i_t, n_key, L, D, CAUSAL)
        for i_i in range(i_first, n_end, BN):
            b_k = load_rows(p_k + i_i.to(tl.int64) * k_t, o_n, o_k, k_t, n_end - i_i, DK)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            if (i_i < i_shared) | (i_i + BN > n_shared):
                b_s = tl.where(sees(b_column, b_ahead, b_seen, i_t, i_i, window, SLIDES), b_s, MASKED)
            if HIDES:
                b_s = tl.where(hidden(mask, i_t, i_i, o_q, o_n, n_t, n_end, m_t) > 0.0, MASKED, b_s)
            b_v = load_rows(p_v + i_i.to(tl.int64) * v_t, o_n, o_v, v_t, n_end - i_i, DV)
            b_m, b_z, b_o = softmax_step(b_s, b_m, b_z, b_o, b_v)
        m_t_ = o_q < n_t
        b_some = b_z > 0.0
        b_sum = tl.where(b_some, b_z, 1.0)
        b_out = (b_o / b_sum[:, None]).to(o.dtype.element_ty)
        p_o = o + (i_row * N1 + i_h) * DV + o_q[:, None] * (N1 * DV) + o_v[None, :]
        tl.store(p_o, b_out, mask=m_t_[:, None] & (o_v < DV)[None, :])
        p_lse = lse + i_h.to(tl.int64) * T + i_row + o_q
        if W == 0:
            tl.store(p_lse, tl.where(b_some, b_m + tl.log(b_sum), EMPTY), mask=m_t_)
        else:
            tl.store(p_lse, tl.where(b_some, b_m + tl.log(b_sum), NEVER), mask=m_t_)
            # [BQ, W]
            o_w = tl.arange(0, W)
            i_state = ((i_row - i_t) * N1 + i_h.to(tl.int64) * n_all + i_t) * W
            b_wide = tl.zeros([BQ, W], tl.float32)
            p_state = o_q[:, None] * W + o_w[None, :]
            tl.store(o_max + i_state + p_state, tl.where(b_some, b_m, NOTHING)[:, None] + b_wide, mask=m_t_[:, None])
            tl.store(o_sum + i_state + p_state, b_z[:, None] + b_wide, mask=m_t_[:, None])


@triton.jit(do_not_specialize=["n_items"])
def attention_terms(
    g,  # [T, N1, DV] the gradient of o
    o,  # [T, N1, DV]
    o_max,  # [T * N1 * W] float32: [N1, query tokens, W] of each segment; if W is 0, the log-sum-exp, [N1, T]
    o_sum,  # the same; dead if W is 0
    tiles,  # [*, 6] int32
    lse,  # [N1, T] float32
    delta,  # [N1, T] float32, the sum of g o
    n_items,
    N1,
    T,
    g_t,  # strides
    g_h,
    o_t,
    o_h,
    W: tl.constexpr,
    BQ: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
):
    """What both backward kernels need of each row."""
    o_q = tl.arange(0, BQ)
    o_v = tl.arange(0, BV)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_h = i_item % N1
        i_row, i_t, n_t, n_all, _, _ = query_tile(tiles, i_item // N1)
        # [BQ, BV]
        b_g = load_rows(g + i_row * g_t + i_h * g_h, o_q, o_v, g_t, n_t, DV).to(tl.float32)
        b_o = load_rows(o + i_row * o_t + i_h * o_h, o_q, o_v, o_t, n_t, DV).to(tl.float32)
        i_out = i_h.to(tl.int64) * T + i_row
        if W == 0:
            b_lse = tl.load(o_max + i_out + o_q, mask=o_q < n_t, other=NEVER)
            b_lse = tl.where(b_lse == EMPTY, NEVER, b_lse)
        else:
            # [BQ, W], all columns equal
            o_w = tl.arange(0, W)
            i_state = ((i_row - i_t) * N1 + i_h.to(tl.int64) * n_all + i_t) * W
            p_state = i_state + o_q[:, None] * W + o_w[None, :]
            b_max = tl.max(tl.load(o_max + p_state, mask=(o_q < n_t)[:, None], other=0.0), axis=1)
            b_sum = tl.max(tl.load(o_sum + p_state, mask=(o_q < n_t)[:, None], other=0.0), axis=1)
            b_lse = tl.where(b_sum > 0.0, b_max + tl.log(tl.where(b_sum > 0.0, b_sum, 1.0)), NEVER)
        tl.store(lse + i_out + o_q, b_lse, mask=o_q < n_t)
        tl.store(delta + i_out + o_q, tl.sum(b_g * b_o, axis=1), mask=o_q < n_t)


@triton.jit(do_not_specialize=["scale", "n_items", "m_t", "window"])
def attention_dq(
    q,  # [T, N1, DK]
    k,  # [S, N2, DK]
    v,  # [S, N2, DV]
    g,  # [T, N1, DV]
    lse,  # [N1, T] float32
    delta,  # [N1, T] float32
    mask,  # uint8; dead if not HIDES
    tiles,  # [*, 6] int32
    dq,  # [T, N1, DK]
    scale,
    n_items,
    N1,
    T,
    g_t,  # strides
    g_h,
    q_t,
    q_h,
    k_t,
    k_n,
    v_t,
    v_n,
    m_t,
    window,  # dead if not SLIDES
    G: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    SLIDES: tl.constexpr,
    HIDES: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    o_q = tl.arange(0, BQ)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    # [BQ, BN] numbers of keys; their differences to those of query tokens
    b_column = tl.zeros([BQ, BN], tl.float32) + o_n.to(tl.float32)[None, :]
    b_ahead = b_column - o_q.to(tl.float32)[:, None]
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_h = i_item % N1
        i_n = i_h // G
        i_row, i_t, n_t, _, i_key, n_key = query_tile(tiles, i_item // N1)
        b_q = load_rows(q + i_row * q_t + i_h * q_h, o_q, o_k, q_t, n_t, DK)
        b_g = load_rows(g + i_row * g_t + i_h * g_h, o_q, o_v, g_t, n_t, DV)
        i_term = i_h.to(tl.int64) * T + i_row
        b_lse = tl.load(lse + i_term + o_q, mask=o_q < n_t, other=NEVER)
        b_delta = tl.load(delta + i_term + o_q, mask=o_q < n_t, other=0.0)
        p_k = k + i_key * k_t + i_n * k_n
        p_v = v + i_key * v_t + i_n * v_n
        b_dq = tl.zeros([BQ, BK], tl.float32)
        # At least one tile, because the accumulator of a loop that never runs holds what was there before. The rounds
        # count from 0: ascendnpu-ir 1.0.0 does not survive such products in others.
        i_first, n_end, i_shared, n_shared = sight(i_t, n_t, n_key, window, L, D, CAUSAL, SLIDES)
        n_end = tl.maximum(n_end, 1)
        # [BQ]
        b_seen = seen_by_rows(o_q.to(tl.float32), i_t, n_key, L, D, CAUSAL)
        for i_step in range(0, (n_end - i_first + BN - 1) // BN):
            i_i = i_first + i_step * BN
            b_k = load_rows(p_k + i_i.to(tl.int64) * k_t, o_n, o_k, k_t, n_end - i_i, DK)
            b_v = load_rows(p_v + i_i.to(tl.int64) * v_t, o_n, o_v, v_t, n_end - i_i, DV)
            b_p, b_slope = weights_and_slopes(b_q, b_k, b_g, b_v, b_lse[:, None], b_delta[:, None], scale)
            b_ds = b_p * b_slope
            if (i_i < i_shared) | (i_i + BN > n_shared):
                b_ds = tl.where(sees(b_column, b_ahead, b_seen, i_t, i_i, window, SLIDES), b_ds, 0.0)
            if HIDES:
                b_ds = tl.where(hidden(mask, i_t, i_i, o_q, o_n, n_t, n_end, m_t) > 0.0, 0.0, b_ds)
            b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
        p_dq = dq + (i_row * N1 + i_h) * DK + o_q[:, None] * (N1 * DK) + o_k[None, :]
        tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=(o_q < n_t)[:, None] & (o_k < DK)[None, :])


@triton.jit(do_not_specialize=["scale", "n_items", "n_splits", "m_t", "window"])
def attention_dkv(
    q,  # [T, N1, DK]
    k,  # [S, N2, DK]
    v,  # [S, N2, DV]
    g,  # [T, N1, DV]
    lse,  # [N1, T] float32
    delta,  # [N1, T] float32
    mask,  # uint8; dead if not HIDES
    tiles,  # [*, 6] int32, of keys, with positions that count from the first query token on
    dk,  # [n_splits, S, N2, DK]
    dv,  # [n_splits, S, N2, DV]
    scale,
    n_items,
    n_splits,
    N2,
    T,
    S,
    g_t,  # strides
    g_h,
    q_t,
    q_h,
    k_t,
    k_n,
    v_t,
    v_n,
    m_t,
    window,  # dead if not SLIDES
    G: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    SLIDES: tl.constexpr,
    HIDES: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    o_q = tl.arange(0, BQ)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    # [BN, BQ] numbers of keys; their differences to those of query tokens
    b_number = tl.zeros([BN, BQ], tl.float32) + o_n.to(tl.float32)[:, None]
    b_ahead = b_number - o_q.to(tl.float32)[None, :]
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_split = i_item % n_splits
        i_n = i_item // n_splits % N2
        i_row, i_i, n_i, n_key, i_query, n_query = query_tile(tiles, i_item // n_splits // N2)
        b_k = load_rows(k + i_row * k_t + i_n * k_n, o_n, o_k, k_t, n_i, DK)
        b_v = load_rows(v + i_row * v_t + i_n * v_n, o_n, o_v, v_t, n_i, DV)
        b_dk = tl.zeros([BN, BK], tl.float32)
        b_dv = tl.zeros([BN, BV], tl.float32)
        i_from = 0
        if SLIDES:  # the query tokens that see some key of the tile, one at least
            n_query = tl.minimum(n_query, tl.maximum(i_i + n_i - 1 + window, 1))
            i_from = tl.maximum(i_i, 0)
        elif CAUSAL:
            i_from = tl.minimum((i_i * D + L - 1) // BQ, (n_query + BQ - 1) // BQ) * BQ
        n_steps = (n_query - i_from + BQ - 1) // BQ * G
        i_begin = n_steps * i_split // n_splits
        n_steps = n_steps * (i_split + 1) // n_splits - i_begin
        # At least one step: the accumulators of a loop that never runs hold what was there before.
        for i_round in range(0, tl.maximum(n_steps, 1)):
            i_step = i_begin + i_round
            i_t = i_from + i_step // G * BQ
            n_t = tl.minimum(n_query - i_t, BQ)
            n_t = tl.where(i_round < n_steps, n_t, 0)
            n_load = tl.maximum(n_t, 1)
            i_h = i_n * G + i_step % G
            i_q = tl.minimum(i_query + i_t, i_query + n_query - 1)
            b_q = load_rows(q + i_q * q_t + i_h * q_h, o_q, o_k, q_t, n_load, DK)
            b_g = load_rows(g + i_q * g_t + i_h * g_h, o_q, o_v, g_t, n_load, DV)
            i_term = i_h.to(tl.int64) * T + i_q
            b_lse = tl.load(lse + i_term + o_q, mask=o_q < n_t, other=NEVER)
            b_delta = tl.load(delta + i_term + o_q, mask=o_q < n_t, other=0.0)
            b_p, b_slope = weights_and_slopes(b_k, b_q, b_v, b_g, b_lse[None, :], b_delta[None, :], scale)
            b_ds = b_p * b_slope
            m_edge = (n_t < BQ) | (i_i + n_i > seen_by(i_t, n_key, L, D, CAUSAL))
            if SLIDES:
                m_edge = m_edge | (i_i < i_t + BQ - window)
            if m_edge:
                # [BQ] tokens of the tile that each row sees, or the last of them; rows that do not exist see nothing
                m_row = o_q.to(tl.float32) < n_t * 1.0
                if SLIDES:
                    b_last = tl.where(m_row, (i_t - i_i) * 1.0, MASKED)
                    m_seen = (b_ahead > (i_t - i_i - window) * 1.0) & (b_ahead <= b_last[None, :])
                else:
                    b_seen = seen_by_rows(o_q.to(tl.float32), i_t, n_key, L, D, CAUSAL) - i_i * 1.0
                    m_seen = b_number < tl.where(m_row, b_seen, 0.0)[None, :]
                b_p = tl.where(m_seen, b_p, 0.0)
                b_ds = tl.where(m_seen, b_ds, 0.0)
            if HIDES:
                b_hidden = tl.trans(hidden(mask, i_t, i_i, o_q, o_n, n_t, i_i + n_i, m_t))
                b_p = tl.where(b_hidden > 0.0, 0.0, b_p)
                b_ds = tl.where(b_hidden > 0.0, 0.0, b_ds)
            b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision="ieee")
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision="ieee")
        i_out = (i_split * S.to(tl.int64) + i_row) * N2 + i_n
        p_dk = dk + i_out * DK + o_n[:, None] * (N2 * DK) + o_k[None, :]
        tl.store(p_dk, (b_dk * scale).to(dk.dtype.element_ty), mask=(o_n < n_i)[:, None] & (o_k < DK)[None, :])
        p_dv = dv + i_out * DV + o_n[:, None] * (N2 * DV) + o_v[None, :]
        tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=(o_n < n_i)[:, None] & (o_v < DV)[None, :])
