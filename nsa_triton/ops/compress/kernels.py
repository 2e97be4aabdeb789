"""Kernels of nsa_compress: weighted sums over overlapping windows, and their two gradients.

    y[r, n, :]  = sum_i w[i, n] x[start(r) + i, n, :]                      i = 0 .. L-1
    dx[t, n, :] = sum_r w[t - start(r), n] g[r, n, :]                      over the windows r that cover token t
    dw[i, n]    = sum_r sum_d g[r, n, d] x[start(r) + i, n, d]

Names: T tokens, R windows (rows of y), N heads, D head size, L window length, S stride; a tile is BT tokens long and
BD columns wide. Segments are flattened by the launcher into a table of tiles, so one launch serves a ragged batch.

Why the vector units and not the cube. As a banded matrix product (a [windows, tokens] band of weights times a
[tokens, D] tile) the forward would be a pure cube kernel, and nearly free. But a band multiplies the tokens *outside*
a window by zero, and 0 * inf = NaN: one non-finite token would spoil every window of its tile, where the operator must
spoil only the windows that cover it. Products of whole stride-chunks keep the windows apart, but then 16 rows of
float32 partial sums per 16 tokens travel from the cube through memory to the vector units, more bytes than the input.
"""

import triton
import triton.language as tl

from nsa_triton.ops._common.primitives import rows_of


@triton.jit
def unpack(i_item, N, D, BD: tl.constexpr):
    """The tile, the head and the first column of an item of work; the items of one tile are neighbours."""
    n_blocks = (D + BD - 1) // BD
    return i_item // n_blocks // N, i_item // n_blocks % N, i_item % n_blocks * BD


@triton.jit(do_not_specialize=["n_items"])
def compress_fwd(
    x,  # [T, N, D]
    w,  # [N, L]
    y,  # [R, N, D]
    tiles,  # [*, 3] first token, first window and number of windows of each tile
    n_items,
    N,
    D,
    x_t,  # strides
    x_n,
    L: tl.constexpr,
    S: tl.constexpr,
    BL: tl.constexpr,  # L, or the power of two above it
    BR: tl.constexpr,  # tokens of a tile: (windows - 1) * S + L, or the power of two above it
    BD: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    o_r = tl.arange(0, BR)
    o_l = tl.arange(0, BL)
    o_d = tl.arange(0, BD)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_tile, i_n, i_d = unpack(i_item, N, D, BD)
        p_tile = tiles + i_tile * 3
        i_t = tl.load(p_tile).to(tl.int64)
        i_r = tl.load(p_tile + 1).to(tl.int64)
        n_windows = tl.load(p_tile + 2)

        # [BL, 1]
        b_w = tl.load(w + i_n * L + o_l, mask=o_l < L, other=0.0).to(tl.float32)[:, None]
        p_x = x + i_t * x_t + i_n * x_n + i_d
        # [BR, BD]: every token of the tile once, though it serves up to L / S windows; dead code if not RESIDENT
        m_x = (o_r < (n_windows - 1) * S + L)[:, None] & (o_d < D - i_d)[None, :]
        b_x = tl.load(p_x + o_r[:, None] * x_t + o_d[None, :], mask=m_x, other=0.0)
        for k in range(0, n_windows):
            # [BL, BD]
            b_k = rows_of(b_x, p_x + k * S * x_t, k * S, x_t, o_l, o_d, BL, BD, L, D - i_d, RESIDENT)
            # [BD]
            b_y = tl.sum(b_k.to(tl.float32) * b_w, axis=0)
            p_y = y + ((i_r + k) * N + i_n) * D + i_d
            tl.store(p_y + o_d, b_y.to(y.dtype.element_ty), mask=o_d < D - i_d)


@triton.jit(do_not_specialize=["n_items"])
def compress_bwd_dx(
    g,  # [R, N, D]
    w,  # [N, L]
    dx,  # [T, N, D]
    tiles,  # [*, 5] first token, tokens, first window that starts in the tile, first row and windows of its segment
    n_items,
    N,
    D,
    g_r,  # strides
    g_n,
    L: tl.constexpr,
    S: tl.constexpr,
    BC: tl.constexpr,  # stride-chunks per tile
    BS: tl.constexpr,  # S, or the power of two above it
    BD: tl.constexpr,
):
    """Token c * S + i gathers from the windows c, c - 1, ... that cover it: no atomics, the same bits every time."""
    o_c = tl.arange(0, BC)
    o_s = tl.arange(0, BS)
    o_d = tl.arange(0, BD)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_tile, i_n, i_d = unpack(i_item, N, D, BD)
        p_tile = tiles + i_tile * 5
        i_t = tl.load(p_tile).to(tl.int64)
        n_tokens = tl.load(p_tile + 1)
        i_c = tl.load(p_tile + 2)
        i_r = tl.load(p_tile + 3).to(tl.int64)
        n_windows = tl.load(p_tile + 4)

        b_dx = tl.zeros([BC, BS, BD], tl.float32)
        for a in range(0, (L + S - 1) // S):  # the window that started a strides before the token's chunk
            # [BC, BD]
            m_g = ((o_c >= a - i_c) & (o_c < n_windows + a - i_c))[:, None] & (o_d < D - i_d)[None, :]
            p_g = g + (i_r + i_c - a) * g_r + i_n * g_n + i_d
            b_g = tl.load(p_g + o_c[:, None] * g_r + o_d[None, :], mask=m_g, other=0.0).to(tl.float32)
            # [BS]
            m_w = (o_s < S) & (o_s < L - a * S)
            b_w = tl.load(w + i_n * L + a * S + o_s, mask=m_w, other=0.0).to(tl.float32)
            b_p = b_g[:, None, :] * b_w[None, :, None]
            if L % S != 0:  # the last window ends inside the chunk: what lies behind it gets nothing, not 0 * inf
                inside = o_s.to(tl.float32) < (L - a * S) * 1.0  # ascendnpu-ir 1.0.0 compares i32 tiles one by one
                b_p = tl.where(inside[None, :, None], b_p, 0.0)
            b_dx += b_p
        p_dx = dx + (i_t * N + i_n) * D + i_d
        if BS == S:
            # one tile of BC * S rows: a single store
            o_t = tl.arange(0, BC * S)
            m_dx = (o_t < n_tokens)[:, None] & (o_d < D - i_d)[None, :]
            b_out = tl.reshape(b_dx, [BC * S, BD]).to(dx.dtype.element_ty)
            tl.store(p_dx + o_t[:, None] * (N * D) + o_d[None, :], b_out, mask=m_dx)
        else:
            o_t = o_c[:, None] * S + o_s[None, :]
            m_dx = ((o_t < n_tokens) & (o_s < S)[None, :])[:, :, None] & (o_d < D - i_d)[None, None, :]
            p_out = p_dx + o_t[:, :, None] * (N * D) + o_d[None, None, :]
            tl.store(p_out, b_dx.to(dx.dtype.element_ty), mask=m_dx)


@triton.jit(do_not_specialize=["n_tiles", "n_splits", "n_items"])
def compress_bwd_dw(
    g,  # [R, N, D]
    x,  # [T, N, D]
    partial,  # [n_splits * ceil(D / BD), L, N] float32
    tiles,  # as in compress_fwd
    n_tiles,
    n_splits,
    n_items,
    N,
    D,
    g_r,  # strides
    g_n,
    x_t,
    x_n,
    L: tl.constexpr,
    S: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,  # windows per tile
    BD: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """First stage of dw: each item sums every n_splits-th tile of one head and one block of columns."""
    o_r = tl.arange(0, BR)
    o_l = tl.arange(0, BL)
    o_k = tl.arange(0, BW)
    o_1 = tl.arange(0, 1)
    o_d = tl.arange(0, BD)
    n_blocks = (D + BD - 1) // BD
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_split, i_n, i_d = unpack(i_item, N, D, BD)
        b_acc = tl.zeros([BL, BD], tl.float32)
        for i_tile in range(i_split, n_tiles, n_splits):
            p_tile = tiles + i_tile * 3
            i_t = tl.load(p_tile).to(tl.int64)
            i_r = tl.load(p_tile + 1).to(tl.int64)
            n_windows = tl.load(p_tile + 2)
            m_d = (o_d < D - i_d)[None, :]
            p_g = g + i_r * g_r + i_n * g_n + i_d
            p_x = x + i_t * x_t + i_n * x_n + i_d
            # [BW, BD]
            b_g = tl.load(p_g + o_k[:, None] * g_r + o_d[None, :], mask=(o_k < n_windows)[:, None] & m_d, other=0.0)
            # [BR, BD]
            m_r = (o_r < (n_windows - 1) * S + L)[:, None]
            b_x = tl.load(p_x + o_r[:, None] * x_t + o_d[None, :], mask=m_r & m_d, other=0.0)
            for k in range(0, n_windows):
                # [1, BD]
                b_gk = rows_of(b_g, p_g + k * g_r, k, g_r, o_1, o_d, 1, BD, 1, D - i_d, RESIDENT)
                # [BL, BD]
                b_xk = rows_of(b_x, p_x + k * S * x_t, k * S, x_t, o_l, o_d, BL, BD, L, D - i_d, RESIDENT)
                b_acc += b_xk.to(tl.float32) * b_gk.to(tl.float32)
        p_partial = partial + (i_split * n_blocks + i_d // BD) * L * N + i_n
        tl.store(p_partial + o_l * N, tl.sum(b_acc, axis=1), mask=o_l < L)
