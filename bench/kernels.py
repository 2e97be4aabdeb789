"""Kernels that only benchmarks use."""

import triton
import triton.language as tl


@triton.jit
def repeated_dot(a, b, c, n_steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANS: tl.constexpr):
    """c = n_steps * (a @ b): operands are loaded again each time, as in attention."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_c = tl.zeros([M, N], tl.float32)
    for _ in range(0, n_steps):
        b_a = tl.load(a + o_m[:, None] * K + o_k[None, :])
        if TRANS:
            b_b = tl.trans(tl.load(b + o_n[:, None] * K + o_k[None, :]))
        else:
            b_b = tl.load(b + o_k[:, None] * N + o_n[None, :])
        b_c += tl.dot(b_a, b_b)
    tl.store(c + o_m[:, None] * N + o_n[None, :], b_c)


@triton.jit
def add_one(x, y, n):
    o = tl.arange(0, 16)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0.0) + 1.0, mask=o < n)
