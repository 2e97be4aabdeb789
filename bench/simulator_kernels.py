"""Kernels whose counterparts were timed on Ascend NPUs by others; `simulator_published.py` names the measurements.

They compute what those compute, with the same tiles where these are known, but are our own: no source was taken over.
"""

import triton
import triton.language as tl


@triton.jit
def row_softmax(
    x,  # [T, N]
    y,  # [T, N]
    x_stride,
    y_stride,
    N,
    BN: tl.constexpr,
):
    """One row per program."""
    row = tl.program_id(0)
    o = tl.arange(0, BN)
    b_x = tl.load(x + row * x_stride + o, mask=o < N, other=-float("inf"))
    b_e = tl.exp(b_x - tl.max(b_x, 0))
    tl.store(y + row * y_stride + o, b_e / tl.sum(b_e, 0), mask=o < N)


@triton.jit
def row_rmsnorm(
    x,  # [T, N]
    w,  # [N]
    y,  # [T, N]
    stride,
    N,
    eps,
    BN: tl.constexpr,
):
    """One row per program."""
    row = tl.program_id(0)
    o = tl.arange(0, BN)
    b_x = tl.load(x + row * stride + o, mask=o < N, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / N + eps)
    b_w = tl.load(w + o, mask=o < N, other=0.0)
    tl.store(y + row * stride + o, b_x * scale * b_w, mask=o < N)


@triton.jit
def row_layernorm(
    x,  # [T, N]
    w,  # [N]
    b,  # [N]
    y,  # [T, N]
    stride,
    N,
    eps,
    BN: tl.constexpr,
):
    """One row per program."""
    row = tl.program_id(0)
    o = tl.arange(0, BN)
    b_x = tl.load(x + row * stride + o, mask=o < N, other=0.0)
    b_d = tl.where(o < N, b_x - tl.sum(b_x, 0) / N, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(b_d * b_d, 0) / N + eps)
    b_w = tl.load(w + o, mask=o < N, other=0.0)
    b_b = tl.load(b + o, mask=o < N, other=0.0)
    tl.store(y + row * stride + o, b_d * scale * b_w + b_b, mask=o < N)


@triton.jit
def add_blocks(x, y, z, n, BN: tl.constexpr):
    """One tile per program."""
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    b_x = tl.load(x + o, mask=o < n, other=0.0)
    b_y = tl.load(y + o, mask=o < n, other=0.0)
    tl.store(z + o, b_x + b_y, mask=o < n)


@triton.jit
def copy_slabs(x, y, SIZE: tl.constexpr, BN: tl.constexpr):
    """Every program copies `SIZE` elements that lie side by side, tile by tile."""
    first = tl.program_id(0) * SIZE
    for start in range(0, SIZE, BN):
        o = first + start + tl.arange(0, BN)
        tl.store(y + o, tl.load(x + o))


@triton.jit
def copy_tiles(x, y, n_tiles, BN: tl.constexpr):
    """Tiles go around the programs."""
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        o = tile * BN + tl.arange(0, BN)
        tl.store(y + o, tl.load(x + o))


@triton.jit
def copy_and_chain(x, y, a, b, n, m, STEPS: tl.constexpr, BN: tl.constexpr):
    """A tile copied, and another one, which is empty behind `m`, multiplied and added to again and again."""
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0.0), mask=o < n)
    tl.debug_barrier()
    b_a = tl.load(a + o, mask=o < m, other=0.0)
    for _ in range(STEPS):
        b_a = b_a * 1.0001 + 0.0001
    tl.store(b + o, b_a, mask=o < m)


@triton.jit
def matmul(
    a,  # [M, K]
    b,  # [N, K]
    c,  # [M, N]
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """c = a @ b.T, whose sizes are multiples of the tiles; tiles of c go around the programs, column by column."""
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    rows = M // BM
    for tile in range(tl.program_id(0), rows * (N // BN), tl.num_programs(0)):
        r_m = (tile % rows) * BM + o_m
        r_n = (tile // rows) * BN + o_n
        # a tile of c, [BM, BN]
        b_c = tl.zeros([BM, BN], tl.float32)
        for start in range(0, K, BK):
            b_a = tl.load(a + r_m[:, None] * K + (start + o_k)[None, :])
            b_b = tl.load(b + r_n[:, None] * K + (start + o_k)[None, :])
            b_c = tl.dot(b_a, tl.trans(b_b), b_c)
        tl.store(c + r_m[:, None] * N + r_n[None, :], b_c)


@triton.jit
def attention(
    q,  # [S, D]
    k,  # [S, D]
    v,  # [S, D]
    y,  # [S, D]
    scale,
    S,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
):
    """Attention of one head over all keys."""
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    for tile in range(tl.program_id(0), S // BM, tl.num_programs(0)):
        p_row = (tile * BM + o_m)[:, None] * D + o_d[None, :]
        b_q = tl.load(q + p_row)
        # largest score and sum of each row, [BM]
        top = tl.full([BM], -1e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        # not yet divided by the sums, [BM, D]
        b_y = tl.zeros([BM, D], tl.float32)
        for start in range(0, S, BN):
            p_key = (start + o_n)[:, None] * D + o_d[None, :]
            # scores of these keys, [BM, BN]
            b_s = tl.dot(b_q, tl.trans(tl.load(k + p_key))) * scale
            new = tl.maximum(top, tl.max(b_s, 1), tl.PropagateNan.ALL)
            b_p = tl.exp(b_s - new[:, None])
            decay = tl.exp(top - new)
            total = total * decay + tl.sum(b_p, 1)
            b_v = tl.load(v + p_key)
            b_y = b_y * decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v)
            top = new
        tl.store(y + p_row, (b_y / total[:, None]).to(y.dtype.element_ty))
