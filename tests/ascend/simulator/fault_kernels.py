"""Small kernels that are right, for tests that plant faults into their programs, and two that are wrong themselves."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, z, n, BLOCK: tl.constexpr):
    """Three tiles, double buffered where the compiler does that; every block takes several of them."""
    for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        o = tile * BLOCK + tl.arange(0, BLOCK)
        m = o < n
        b_x = tl.load(x + o, mask=m, other=0.0)
        b_y = tl.load(y + o, mask=m, other=0.0)
        b_z = tl.exp(b_x) + b_y
        tl.store(z + o, b_z, mask=m)


@triton.jit
def attend(q, k, v, o, n_steps, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """One cube core and two vector cores: attention, without the stabilisation by the maximum."""
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    b_q = tl.load(q + (tl.program_id(0) * BM + o_m)[:, None] * D + o_d[None, :])
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for step in range(0, n_steps):
        rows = step * BN + o_n
        b_k = tl.load(k + rows[:, None] * D + o_d[None, :])
        b_p = tl.exp(tl.dot(b_q, tl.trans(b_k)) * scale)
        total += tl.sum(b_p, 1)
        b_v = tl.load(v + rows[:, None] * D + o_d[None, :])
        acc += tl.dot(b_p.to(b_v.dtype), b_v)
    b_o = acc / total[:, None]
    tl.store(o + (tl.program_id(0) * BM + o_m)[:, None] * D + o_d[None, :], b_o.to(o.dtype.element_ty))


@triton.jit
def gather_rows(x, index, y, n, D: tl.constexpr):
    """The scalar unit reads where a row begins, and a row's sum decides whether the row is negated."""
    o = tl.arange(0, D)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        row = tl.load(index + i)
        b_x = tl.load(x + row * D + o)
        sign = tl.where(tl.sum(b_x, 0) < 0, -1.0, 1.0)
        tl.store(y + i * D + o, b_x * sign)


@triton.jit
def halves(x, y, BLOCK: tl.constexpr):
    """Wrong: the second half of what a block writes is the first half of the next one."""
    o = tl.arange(0, BLOCK)
    i = tl.program_id(0)
    tl.store(y + i * (BLOCK // 2) + o, tl.load(x + i * BLOCK + o))


@triton.jit
def last_row(x, y, BLOCK: tl.constexpr):
    """Wrong: all blocks read the last row, and the block that it belongs to overwrites it."""
    o = tl.arange(0, BLOCK)
    i = tl.program_id(0)
    last = tl.num_programs(0) - 1
    b_x = tl.load(x + last * BLOCK + o)
    tl.store(y + i * BLOCK + o, b_x)
    if i == last:
        tl.store(x + i * BLOCK + o, b_x + 1.0)
