"""Kernels of nsa_compress_attention: attention over compressed tokens.

    s[t, h, i] = scale q[t, h, :] k[i, :]                             i: compressed tokens that query token t sees
    p[t, h, i] = exp(s[t, h, i] - lse[t, h]),    out[t, h, :] = sum_i p[t, h, i] v[i, :]

Names: T query tokens and S compressed tokens of all segments; N1 query heads, N2 kv heads, G = N1 / N2 heads in a
group; L raw tokens per compression window, D between two windows. With CAUSAL, query token t of a segment sees the
windows that end at t or before, i D + L - 1 <= t.

The rows of a tile are BQ query tokens of one head. Tiles of compressed tokens that all rows see come first, without any
masking; then those that some rows see; those that none sees are not visited. The forward kernel with BE = BN masks all
tiles: one loop needs half the on-chip memory of two, so that its tiles may be larger.
"""

import triton
import triton.language as tl

from nsa_triton.ops._common.primitives import MASKED, NO_SCORE, softmax_step

NOTHING: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # the maximum of a row that sees nothing
NEVER: tl.constexpr = tl.constexpr(3e38)  # its log-sum-exp: exp(s - NEVER) is 0 for every s
FORCED: tl.constexpr = tl.constexpr(3e38)  # the score of a forced block
BEHIND: tl.constexpr = tl.constexpr(1e9)  # larger than every row number


@triton.jit
def query_tile(tiles, i_tile):
    """Of a tile of query tokens: first row of q; first token, and tokens, of the tile; tokens of the segment; first row
    of k and compressed tokens of the segment."""
    p_tile = tiles + i_tile * 6
    i_row = tl.load(p_tile).to(tl.int64)
    i_key = tl.load(p_tile + 4).to(tl.int64)
    return i_row, tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3), i_key, tl.load(p_tile + 5)


@triton.jit
def seen_by(i_t, n_key, L: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr):
    """How many of n_key compressed tokens the query token i_t sees."""
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
def load_rows(p_x, o_r, o_c, stride, n_r, n_c):
    """[R, C] the first n_r rows and n_c columns of a matrix, else 0."""
    m_x = (o_r < n_r)[:, None] & (o_c < n_c)[None, :]
    return tl.load(p_x + o_r[:, None] * stride + o_c[None, :], mask=m_x, other=0.0)


@triton.jit
def hidden(mask, i_t, i_i, o_q, o_n, n_t, n_end, m_t):
    """[BQ, BN] float32, not 0 where the mask hides a compressed token from a query token."""
    p_mask = mask + i_t.to(tl.int64) * m_t + i_i
    return load_rows(p_mask, o_q, o_n, m_t, n_t, n_end - i_i).to(tl.float32)


@triton.jit(do_not_specialize=["scale", "n_items", "m_t"])
def compress_attention_fwd(
    q,  # [T, N1, DK]
    k,  # [S, N2, DK]
    v,  # [S, N2, DV]
    mask,  # [most query tokens, most compressed tokens] uint8, not 0 where hidden; dead if not HIDES
    tiles,  # [*, 6] int32
    o,  # [T, N1, DV]
    o_max,  # [T * N1 * W] float32: [N1, query tokens, W] of each segment
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
    G: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HIDES: tl.constexpr,
    W: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,  # compressed tokens in a tile that some rows do not see all of
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    o_q = tl.arange(0, BQ)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_w = tl.arange(0, W)
    o_e = tl.arange(0, BE)
    # [BQ, BE]
    b_column = tl.zeros([BQ, BE], tl.float32) + o_e.to(tl.float32)[None, :]
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
        n_full = 0
        if BE < BN and not HIDES:
            n_full = seen_by(i_t, n_key, L, D, CAUSAL) // BN * BN
            for i_i in range(0, n_full, BN):
                b_k = load_rows(p_k + i_i.to(tl.int64) * k_t, o_n, o_k, k_t, BN, DK)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
                b_v = load_rows(p_v + i_i.to(tl.int64) * v_t, o_n, o_v, v_t, BN, DV)
                b_m, b_z, b_o = softmax_step(b_s, b_m, b_z, b_o, b_v)
        n_end = seen_by(i_t + n_t - 1, n_key, L, D, CAUSAL)
        # [BQ]
        b_seen = seen_by_rows(o_q.to(tl.float32), i_t, n_key, L, D, CAUSAL)
        for i_i in range(n_full, n_end, BE):
            b_k = load_rows(p_k + i_i.to(tl.int64) * k_t, o_e, o_k, k_t, n_end - i_i, DK)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            b_s = tl.where(b_column < (b_seen - i_i * 1.0)[:, None], b_s, MASKED)
            if HIDES:
                b_s = tl.where(hidden(mask, i_t, i_i, o_q, o_e, n_t, n_end, m_t) > 0.0, MASKED, b_s)
            b_v = load_rows(p_v + i_i.to(tl.int64) * v_t, o_e, o_v, v_t, n_end - i_i, DV)
            b_m, b_z, b_o = softmax_step(b_s, b_m, b_z, b_o, b_v)
        m_t_ = o_q < n_t
        b_some = b_z > 0.0
        b_sum = tl.where(b_some, b_z, 1.0)
        b_out = (b_o / b_sum[:, None]).to(o.dtype.element_ty)
        p_o = o + (i_row * N1 + i_h) * DV + o_q[:, None] * (N1 * DV) + o_v[None, :]
        tl.store(p_o, b_out, mask=m_t_[:, None] & (o_v < DV)[None, :])
        tl.store(lse + i_h.to(tl.int64) * T + i_row + o_q, tl.where(b_some, b_m + tl.log(b_sum), NEVER), mask=m_t_)
        # [BQ, W]
        i_state = ((i_row - i_t) * N1 + i_h.to(tl.int64) * n_all + i_t) * W
        b_wide = tl.zeros([BQ, W], tl.float32)
        p_state = o_q[:, None] * W + o_w[None, :]
        tl.store(o_max + i_state + p_state, tl.where(b_some, b_m, NOTHING)[:, None] + b_wide, mask=m_t_[:, None])
        tl.store(o_sum + i_state + p_state, b_z[:, None] + b_wide, mask=m_t_[:, None])


@triton.jit(do_not_specialize=["scale", "n_items", "i_first", "n_rows", "m_t"])
def compress_attention_scores(
    q,  # [T, N1, DK]
    k,  # [S, N2, DK]
    mask,  # uint8; dead if not HIDES
    lse,  # [N1, T] float32
    fold,  # [BF, BN] float32: how often a token counts for its own block, the next one and the one before
    tiles,  # [*, 6] int32
    sums,  # [n_items, n_rows, BQ] float32, a row for each block and plane
    scale,
    n_items,  # tiles of this launch, times N2
    i_first,  # its first tile
    n_rows,
    N1,
    N2,
    T,
    q_t,  # strides
    q_h,
    k_t,
    k_n,
    m_t,
    G: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HIDES: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,  # tokens of the whole blocks in a tile, at most BN
    ROWS: tl.constexpr,  # blocks in a tile times planes
    BF: tl.constexpr,  # ROWS, or the tile that holds them
    DK: tl.constexpr,
    BK: tl.constexpr,
):
    """What the tokens of each block add to its own score, to the next one and to the one before, which are the planes.

    They are summed over the heads of a group before they are folded into blocks. No block lies in two tiles, so that
    equal scores stay equal.
    """
    o_q = tl.arange(0, BQ)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_f = tl.arange(0, BF)
    # [BN, BQ]
    b_token = tl.zeros([BN, BQ], tl.float32) + o_n.to(tl.float32)[:, None]
    # [BF, BN]
    b_fold = tl.load(fold + o_f[:, None] * BN + o_n[None, :])
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_n = i_item % N2
        i_row, i_t, n_t, _, i_key, n_key = query_tile(tiles, i_first + i_item // N2)
        n_seen = seen_by(i_t + n_t - 1, n_key, L, D, CAUSAL)
        # [BQ] rows that do not exist see nothing
        b_seen = seen_by_rows(o_q.to(tl.float32), i_t, n_key, L, D, CAUSAL)
        b_seen = tl.where(o_q.to(tl.float32) < n_t * 1.0, b_seen, 0.0)
        p_k = k + i_key * k_t + i_n * k_n
        for i_i in range(0, n_seen, STEP):
            b_k = load_rows(p_k + i_i.to(tl.int64) * k_t, o_n, o_k, k_t, n_seen - i_i, DK)
            # [BN, BQ] the probabilities, summed over the heads
            b_p = tl.zeros([BN, BQ], tl.float32)
            for i_g in range(0, G):
                i_h = i_n * G + i_g
                b_q = load_rows(q + i_row * q_t + i_h * q_h, o_q, o_k, q_t, n_t, DK)
                b_lse = tl.load(lse + i_h.to(tl.int64) * T + i_row + o_q, mask=o_q < n_t, other=NEVER)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
                b_p += tl.exp(b_s - b_lse[None, :])
            b_limit = tl.minimum(b_seen - i_i * 1.0, STEP * 1.0, tl.PropagateNan.ALL)
            b_p = tl.where(b_token < b_limit[None, :], b_p, 0.0)
            if HIDES:
                b_hidden = tl.trans(hidden(mask, i_t, i_i, o_q, o_n, n_t, n_seen, m_t))
                b_p = tl.where(b_hidden > 0.0, 0.0, b_p)
            # [BF, BQ]
            b_sums = tl.dot(b_fold, b_p, input_precision="ieee")
            p_sums = sums + (i_item.to(tl.int64) * n_rows + i_i // STEP * ROWS) * BQ
            tl.store(p_sums + o_f[:, None] * BQ + o_q[None, :], b_sums, mask=(o_f < ROWS)[:, None])


@triton.jit(do_not_specialize=["n_items", "i_first", "n_rows", "t_t"])
def compress_attention_choose(
    sums,  # [n_items, n_rows, BQ] float32, a row for each block and plane
    forced,  # [most query tokens, most blocks] uint8, not 0 where a block is forced; dead if not FORCES
    tiles,  # [*, 6] int32
    ids,  # [T, N2, K] int32
    n_items,
    i_first,
    n_rows,
    N2,
    t_t,  # stride of forced
    L: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,  # L', raw tokens per selection block
    CAUSAL: tl.constexpr,
    FORCES: tl.constexpr,
    INIT: tl.constexpr,  # forced blocks at the beginning
    LOCAL: tl.constexpr,  # forced blocks up to that of the query token
    NEXT: tl.constexpr,
    BEFORE: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,  # query tokens that are looked at at once; divides BQ
    BC: tl.constexpr,  # blocks that are looked at at once
    CHUNKED: tl.constexpr,  # whether there may be more
    BP: tl.constexpr,  # K, or the power of two above it
):
    """The K best blocks of each query token and kv head: forced ones, then by descending score, then by number."""
    PLANES: tl.constexpr = 1 + NEXT + BEFORE
    PARTS: tl.constexpr = BQ // BR
    o_r = tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    o_p = tl.arange(0, BP)
    # [BC, BR], [BP, BR]
    b_row = tl.zeros([BC, BR], tl.float32) + o_c.to(tl.float32)[:, None]
    b_rank = tl.zeros([BP, BR], tl.float32) + o_p.to(tl.float32)[:, None]
    for i_item in range(tl.program_id(0), n_items * PARTS, tl.num_programs(0)):
        i_part = i_item % PARTS * BR
        i_n = i_item // PARTS % N2
        i_row, i_t, n_t, _, _, n_key = query_tile(tiles, i_first + i_item // PARTS // N2)
        n_mine = tl.minimum(n_t - i_part, BR)
        n_seen = seen_by(i_t + n_t - 1, n_key, L, D, CAUSAL)
        n_written = (n_seen + STEP - 1) // STEP * (STEP // M)
        n_blocks = (n_key + M - 1) // M
        # Blocks behind those have score 0, and numbers behind K others of score 0.
        n_looked = n_blocks if FORCES else tl.minimum(n_blocks, tl.maximum(n_written + 1, K))
        if LOCAL > 0:
            n_looked = tl.minimum(n_blocks, tl.maximum(n_looked, (i_t + n_t - 1) // BLOCK + 1))
        # [1, BR] the block of each query token
        i_rest = (i_t + i_part) % BLOCK
        b_own = ((o_r.to(tl.float32) + (i_rest + 0.5)) / BLOCK).to(tl.int32).to(tl.float32)
        b_own = (b_own + ((i_t + i_part) // BLOCK) * 1.0)[None, :]
        # [BP, BR] the best so far, descending: scores and numbers
        b_best = tl.full([BP, BR], -1.0, tl.float32)
        b_ids = tl.full([BP, BR], -1.0, tl.float32)
        p_item = sums + (i_item // PARTS).to(tl.int64) * n_rows * BQ + i_part + o_r[None, :]
        for i_c in range(0, n_looked, BC):
            p_c = p_item + (i_c + o_c)[:, None] * (PLANES * BQ)
            b_x = tl.load(p_c, mask=(o_c < n_written - i_c)[:, None], other=0.0)
            if NEXT:
                m_next = ((o_c >= 1 - i_c) & (o_c < n_written + 1 - i_c))[:, None]
                b_x += tl.load(p_c + (1 - PLANES) * BQ, mask=m_next, other=0.0)
            if BEFORE:
                m_before = (o_c < n_written - 1 - i_c)[:, None]
                b_x += tl.load(p_c + (2 * PLANES - 1) * BQ, mask=m_before, other=0.0)
            b_x = tl.where(b_x >= 0.0, b_x, 0.0)  # NaN
            if FORCES:
                m_f = (o_r < n_mine)[:, None] & (o_c < n_blocks - i_c)[None, :]
                p_f = forced + (i_t + i_part).to(tl.int64) * t_t + i_c + o_r[:, None] * t_t + o_c[None, :]
                b_f = tl.trans(tl.load(p_f, mask=m_f, other=0).to(tl.float32))
                b_x = tl.where(b_f > 0.0, FORCED, b_x)
            if INIT > 0:
                b_x = tl.where(b_row < INIT - i_c * 1.0, FORCED, b_x)
            if LOCAL > 0:
                b_behind = b_own - b_row - i_c * 1.0
                b_x = tl.where(b_behind >= 0.0, tl.where(b_behind < LOCAL * 1.0, FORCED, b_x), b_x)
            b_x = tl.where(b_row < (n_blocks - i_c) * 1.0, b_x, -1.0)
            # Another name for b_best would share its buffer, which is that of b_new too: see CONTRIBUTING.md.
            b_old = tl.maximum(b_best, -1.0, tl.PropagateNan.ALL)
            b_new = tl.full([BP, BR], -1.0, tl.float32)
            b_new_ids = tl.full([BP, BR], -1.0, tl.float32)
            for i_k in range(0, K):
                # [BR] the largest, and the first row that has it
                b_max = tl.max(b_x, axis=0)
                b_at = tl.min(tl.where(b_x == b_max[None, :], b_row, BEHIND), axis=0)
                b_id = b_at + i_c * 1.0
                if CHUNKED:
                    b_max_old = tl.max(b_old, axis=0)
                    b_at_old = tl.min(tl.where(b_old == b_max_old[None, :], b_rank, BEHIND), axis=0)
                    # of equal scores the old one has the lower number
                    b_old_wins = b_max_old >= b_max
                    b_id_old = tl.sum(tl.where(b_rank == b_at_old[None, :], b_ids, 0.0), axis=0)
                    b_at = tl.where(b_old_wins, -1.0, b_at)
                    b_at_old = tl.where(b_old_wins, b_at_old, -1.0)
                    b_id = tl.where(b_old_wins, b_id_old, b_id)
                    b_max = tl.where(b_old_wins, b_max_old, b_max)
                    b_old = tl.where(b_rank == b_at_old[None, :], -1.0, b_old)
                b_x = tl.where(b_row == b_at[None, :], -1.0, b_x)
                b_id = tl.where(b_max >= 0.0, b_id, -1.0)
                b_new = tl.where(b_rank == i_k * 1.0, b_max[None, :], b_new)
                b_new_ids = tl.where(b_rank == i_k * 1.0, b_id[None, :], b_new_ids)
            b_best = b_new
            b_ids = b_new_ids
        p_ids = ids + ((i_row + i_part) * N2 + i_n) * K + o_r[:, None] * (N2 * K) + o_p[None, :]
        tl.store(p_ids, tl.trans(b_ids).to(tl.int32), mask=(o_r < n_mine)[:, None] & (o_p < K)[None, :])


@triton.jit(do_not_specialize=["n_items"])
def compress_attention_terms(
    g,  # [T, N1, DV] the gradient of o
    o,  # [T, N1, DV]
    o_max,  # [T * N1 * W] float32: [N1, query tokens, W] of each segment
    o_sum,  # the same
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
    o_w = tl.arange(0, W)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_h = i_item % N1
        i_row, i_t, n_t, n_all, _, _ = query_tile(tiles, i_item // N1)
        # [BQ, BV]
        b_g = load_rows(g + i_row * g_t + i_h * g_h, o_q, o_v, g_t, n_t, DV).to(tl.float32)
        b_o = load_rows(o + i_row * o_t + i_h * o_h, o_q, o_v, o_t, n_t, DV).to(tl.float32)
        # [BQ, W], all columns equal
        i_state = ((i_row - i_t) * N1 + i_h.to(tl.int64) * n_all + i_t) * W
        p_state = i_state + o_q[:, None] * W + o_w[None, :]
        b_max = tl.max(tl.load(o_max + p_state, mask=(o_q < n_t)[:, None], other=0.0), axis=1)
        b_sum = tl.max(tl.load(o_sum + p_state, mask=(o_q < n_t)[:, None], other=0.0), axis=1)
        b_lse = tl.where(b_sum > 0.0, b_max + tl.log(tl.where(b_sum > 0.0, b_sum, 1.0)), NEVER)
        i_out = i_h.to(tl.int64) * T + i_row
        tl.store(lse + i_out + o_q, b_lse, mask=o_q < n_t)
        tl.store(delta + i_out + o_q, tl.sum(b_g * b_o, axis=1), mask=o_q < n_t)


@triton.jit(do_not_specialize=["scale", "n_items", "m_t"])
def compress_attention_bwd_dq(
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
    G: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HIDES: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,  # compressed tokens in a tile that some rows do not see all of
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    o_q = tl.arange(0, BQ)
    o_n = tl.arange(0, BN)
    o_e = tl.arange(0, BE)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    # [BQ, BE]
    b_column = tl.zeros([BQ, BE], tl.float32) + o_e.to(tl.float32)[None, :]
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
        # At least one tile is masked: the accumulator of a loop that never runs holds what was there before. The rounds
        # of both loops count from 0: ascendnpu-ir 1.0.0 does not survive such products in others.
        n_full = 0
        if BE < BN and not HIDES:
            n_full = tl.maximum(seen_by(i_t, n_key, L, D, CAUSAL) - 1, 0) // BN * BN
        n_end = tl.maximum(seen_by(i_t + n_t - 1, n_key, L, D, CAUSAL), 1)
        # [BQ]
        b_seen = seen_by_rows(o_q.to(tl.float32), i_t, n_key, L, D, CAUSAL)
        for i_step in range(0, (n_end - n_full + BE - 1) // BE):
            i_i = n_full + i_step * BE
            b_k = load_rows(p_k + i_i.to(tl.int64) * k_t, o_e, o_k, k_t, n_end - i_i, DK)
            b_v = load_rows(p_v + i_i.to(tl.int64) * v_t, o_e, o_v, v_t, n_end - i_i, DV)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            b_p = tl.exp(b_s - b_lse[:, None])
            b_ds = b_p * (tl.dot(b_g, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
            b_ds = tl.where(b_column < (b_seen - i_i * 1.0)[:, None], b_ds, 0.0)
            if HIDES:
                b_ds = tl.where(hidden(mask, i_t, i_i, o_q, o_e, n_t, n_end, m_t) > 0.0, 0.0, b_ds)
            b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
        if BE < BN and not HIDES:
            for i_i in range(0, n_full, BN):
                b_k = load_rows(p_k + i_i.to(tl.int64) * k_t, o_n, o_k, k_t, BN, DK)
                b_v = load_rows(p_v + i_i.to(tl.int64) * v_t, o_n, o_v, v_t, BN, DV)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
                b_p = tl.exp(b_s - b_lse[:, None])
                b_ds = b_p * (tl.dot(b_g, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
                b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
        p_dq = dq + (i_row * N1 + i_h) * DK + o_q[:, None] * (N1 * DK) + o_k[None, :]
        tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=(o_q < n_t)[:, None] & (o_k < DK)[None, :])


@triton.jit(do_not_specialize=["scale", "n_items", "n_splits", "m_t"])
def compress_attention_bwd_dkv(
    q,  # [T, N1, DK]
    k,  # [S, N2, DK]
    v,  # [S, N2, DV]
    g,  # [T, N1, DV]
    lse,  # [N1, T] float32
    delta,  # [N1, T] float32
    mask,  # uint8; dead if not HIDES
    tiles,  # [*, 6] int32, of compressed tokens
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
    G: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HIDES: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,  # query tokens in a tile of which some do not see all; divides BQ
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    o_q = tl.arange(0, BQ)
    o_e = tl.arange(0, BE)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    # [BN, BE]
    b_number = tl.zeros([BN, BE], tl.float32) + o_n.to(tl.float32)[:, None]
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_split = i_item % n_splits
        i_n = i_item // n_splits % N2
        i_row, i_i, n_i, n_key, i_query, n_query = query_tile(tiles, i_item // n_splits // N2)
        b_k = load_rows(k + i_row * k_t + i_n * k_n, o_n, o_k, k_t, n_i, DK)
        b_v = load_rows(v + i_row * v_t + i_n * v_n, o_n, o_v, v_t, n_i, DV)
        b_dk = tl.zeros([BN, BK], tl.float32)
        b_dv = tl.zeros([BN, BV], tl.float32)
        # Edge tiles of BE query tokens: the first that sees some token; the first from which on all see all, where a
        # whole tile of BQ begins; the one behind the last whole tile of BQ; and the end.
        n_end = (n_query + BE - 1) // BE
        n_first, n_all, n_whole = 0, n_end, n_end
        if CAUSAL:
            n_first = tl.minimum((i_i * D + L - 1) // BE, n_end)
        if BE < BQ and not HIDES:
            n_all, n_whole = n_first, n_query // BQ * (BQ // BE)
            if CAUSAL:
                n_all = ((i_i + n_i - 1) * D + L - 1 + BQ - 1) // BQ * (BQ // BE)
                n_all = tl.minimum(n_all, n_end)
            n_whole = tl.maximum(n_whole, n_all)
        # Masked are those in [n_first, n_all) and in [n_whole, n_end), each with all heads.
        n_masked = (n_all - n_first + n_end - n_whole) * G
        # At least one step: the accumulators of a loop that never runs hold what was there before.
        i_masked = n_masked * i_split // n_splits
        n_masked = n_masked * (i_split + 1) // n_splits - i_masked
        for i_round in range(0, tl.maximum(n_masked, 1)):
            i_step = i_masked + i_round
            i_tile = n_first + i_step // G
            i_tile = tl.where(i_tile < n_all, i_tile, i_tile - n_all + n_whole)
            i_t = i_tile * BE
            n_t = tl.minimum(n_query - i_t, BE)
            n_t = tl.where(i_round < n_masked, n_t, 0)
            n_load = tl.maximum(n_t, 1)
            i_h = i_n * G + i_step % G
            i_q = tl.minimum(i_query + i_t, i_query + n_query - 1)
            b_q = load_rows(q + i_q * q_t + i_h * q_h, o_e, o_k, q_t, n_load, DK)
            b_g = load_rows(g + i_q * g_t + i_h * g_h, o_e, o_v, g_t, n_load, DV)
            i_term = i_h.to(tl.int64) * T + i_q
            b_lse = tl.load(lse + i_term + o_e, mask=o_e < n_t, other=NEVER)
            b_delta = tl.load(delta + i_term + o_e, mask=o_e < n_t, other=0.0)
            # [BE] tokens of the tile that each row sees; rows that do not exist see nothing
            b_seen = seen_by_rows(o_e.to(tl.float32), i_t, n_key, L, D, CAUSAL) - i_i * 1.0
            b_seen = tl.where(o_e.to(tl.float32) < n_t * 1.0, b_seen, 0.0)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
            b_p = tl.where(b_number < b_seen[None, :], tl.exp(b_s - b_lse[None, :]), 0.0)
            b_dp = tl.dot(b_v, tl.trans(b_g), input_precision="ieee")
            b_ds = tl.where(b_number < b_seen[None, :], b_p * (b_dp - b_delta[None, :]), 0.0)
            if HIDES:
                b_hidden = tl.trans(hidden(mask, i_t, i_i, o_e, o_n, n_t, i_i + n_i, m_t))
                b_p = tl.where(b_hidden > 0.0, 0.0, b_p)
                b_ds = tl.where(b_hidden > 0.0, 0.0, b_ds)
            b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision="ieee")
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision="ieee")
        if BE < BQ and not HIDES:
            i_free = (n_whole - n_all) // (BQ // BE) * G * i_split // n_splits
            n_free = (n_whole - n_all) // (BQ // BE) * G * (i_split + 1) // n_splits - i_free
            for i_round in range(0, n_free):
                i_step = i_free + i_round
                i_h = i_n * G + i_step % G
                i_q = i_query + n_all * BE + i_step // G * BQ
                b_q = load_rows(q + i_q * q_t + i_h * q_h, o_q, o_k, q_t, BQ, DK)
                b_g = load_rows(g + i_q * g_t + i_h * g_h, o_q, o_v, g_t, BQ, DV)
                i_term = i_h.to(tl.int64) * T + i_q
                b_lse = tl.load(lse + i_term + o_q)
                b_delta = tl.load(delta + i_term + o_q)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
                b_p = tl.exp(b_s - b_lse[None, :])
                b_dp = tl.dot(b_v, tl.trans(b_g), input_precision="ieee")
                b_ds = b_p * (b_dp - b_delta[None, :])
                b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision="ieee")
                b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision="ieee")
        i_out = (i_split * S.to(tl.int64) + i_row) * N2 + i_n
        p_dk = dk + i_out * DK + o_n[:, None] * (N2 * DK) + o_k[None, :]
        tl.store(p_dk, (b_dk * scale).to(dk.dtype.element_ty), mask=(o_n < n_i)[:, None] & (o_k < DK)[None, :])
        p_dv = dv + i_out * DV + o_n[:, None] * (N2 * DV) + o_v[None, :]
        tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=(o_n < n_i)[:, None] & (o_v < DV)[None, :])
