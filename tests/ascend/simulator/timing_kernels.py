"""Small kernels whose time on a chip is limited by one thing each: memory, the vector unit, or the cube."""

import triton
import triton.language as tl


@triton.jit
def copied(x, y, n_tiles, BLOCK: tl.constexpr):
    """Nothing but transfers."""
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        o = tile * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + o, tl.load(x + o))


@triton.jit
def polynomial(x, y, n_tiles, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """Many vector instructions for every transfer; two loops, one in the other."""
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        o = tile * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(x + o)
        b_y = b_x
        for _ in range(TERMS):
            b_y = b_y * b_x + 0.5
        tl.store(y + o, b_y)


@triton.jit
def multiplied(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a @ b, for sizes that are multiples of the tiles."""
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    for tile in range(tl.program_id(0), (M // BM) * (N // BN), tl.num_programs(0)):
        r_m = tile % (M // BM) * BM + o_m
        r_n = tile // (M // BM) * BN + o_n
        b_c = tl.zeros([BM, BN], tl.float32)
        for start in range(0, K, BK):
            b_a = tl.load(a + r_m[:, None] * K + (start + o_k)[None, :])
            b_b = tl.load(b + (start + o_k)[:, None] * N + r_n[None, :])
            b_c = tl.dot(b_a, b_b, b_c)
        tl.store(c + r_m[:, None] * N + r_n[None, :], b_c)


@triton.jit
def triangle(a, b, y, n_tiles, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Rounds of an inner loop, more for every tile, in which the cube and the vector cores wait for one another."""
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        b_a = tl.load(a + (tile * BM + o_m)[:, None] * BK + o_k[None, :])
        b_y = tl.zeros([BM, BK], tl.float32)
        for i in range(tile + 1):
            b_b = tl.load(b + (i * BN + o_n)[:, None] * BK + o_k[None, :])
            b_s = tl.exp(tl.dot(b_a, tl.trans(b_b)))
            b_y = b_y * 0.5 + tl.dot(b_s.to(tl.float16), b_b)
        tl.store(y + (tile * BM + o_m)[:, None] * BK + o_k[None, :], b_y)
