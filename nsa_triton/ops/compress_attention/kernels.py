"""Kernels of nsa_compress_attention that choose blocks; the attention itself is in `_common/attention_kernels.py`.

Names: T query tokens and S compressed tokens of all segments; N1 query heads, N2 kv heads, G = N1 / N2 heads in a
group; L raw tokens per compression window, D between two windows. With CAUSAL, query token t of a segment sees the
windows that end at t or before, i D + L - 1 <= t.
"""

import triton
import triton.language as tl

from nsa_triton.ops._common.attention_kernels import NEVER, hidden, query_tile, seen_by, seen_by_rows
from nsa_triton.ops._common.primitives import load_rows

FORCED: tl.constexpr = tl.constexpr(3e38)  # the score of a forced block
BEHIND: tl.constexpr = tl.constexpr(1e9)  # larger than every row number


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
        i_row, i_t, n_t, n_query, _, n_key = query_tile(tiles, i_first + i_item // PARTS // N2)
        n_mine = tl.minimum(n_t - i_part, BR)
        n_seen = seen_by(i_t + n_t - 1, n_key, L, D, CAUSAL)
        n_written = (n_seen + STEP - 1) // STEP * (STEP // M)
        n_blocks = (n_key + M - 1) // M
        if LOCAL > 0:
            n_blocks = tl.maximum(n_blocks, (n_query + BLOCK - 1) // BLOCK)
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
