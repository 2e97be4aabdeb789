"""Small kernels that each show one thing a compile report has to tell."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, z, n, BLOCK: tl.constexpr):
    """The fp32 add of the Ascend guide, section 4.2: three tiles, each double buffered where they fit."""
    for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        o = tile * BLOCK + tl.arange(0, BLOCK)
        m = o < n
        b_x = tl.load(x + o, mask=m, other=0.0)
        b_y = tl.load(y + o, mask=m, other=0.0)
        tl.store(z + o, b_x + b_y, mask=m)


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """One dot and nothing else: runs on the cube alone."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(a + o_m[:, None] * K + o_k[None, :])
    b_b = tl.load(b + o_k[:, None] * N + o_n[None, :])
    tl.store(c + o_m[:, None] * N + o_n[None, :], tl.dot(b_a, b_b))


@triton.jit
def attention(q, k, v, o, table, scale, n_steps, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """Attention over pages found in a table: a mix of cube and vector work, with a scalar load of a page id."""
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    b_q = tl.load(q + (tl.program_id(0) * BM + o_m)[:, None] * D + o_d[None, :])
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for step in range(0, n_steps):
        rows = tl.load(table + step).to(tl.int64) * BN + o_n
        b_k = tl.load(k + rows[:, None] * D + o_d[None, :])
        b_s = tl.dot(b_q, tl.trans(b_k)) * scale
        new = tl.maximum(top, tl.max(b_s, 1), tl.PropagateNan.ALL)
        b_p = tl.exp(b_s - new[:, None])
        decay = tl.exp(top - new)
        total = total * decay + tl.sum(b_p, 1)
        b_v = tl.load(v + rows[:, None] * D + o_d[None, :])
        acc = acc * decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v)
        top = new
    b_o = acc / total[:, None]
    tl.store(o + (tl.program_id(0) * BM + o_m)[:, None] * D + o_d[None, :], b_o.to(o.dtype.element_ty))


@triton.jit
def scaled_product(a, b, c, rows, columns, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WITH: tl.constexpr):
    """Vector work on a product, whose rows a compiler may share out among the two vector cores of a cube core."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(a + o_m[:, None] * K + o_k[None, :])
    b_c = tl.dot(b_a, tl.load(b + o_k[:, None] * N + o_n[None, :])) * 0.5
    if WITH == "a number for each row":
        b_c += tl.load(rows + o_m)[:, None]
    if WITH == "a number for each column":
        b_c += tl.load(columns + o_n)[None, :]
    if WITH == "a select":
        b_c = tl.where(b_c < n, b_c, 0.0)
    if WITH == "a branch":  # noqa: SIM102 (known when the kernel is compiled, the other one when it runs)
        if n > 1:
            b_c = tl.where(b_c < n, b_c, 0.0)
    if WITH == "a sum of each row":
        tl.store(rows + o_m, tl.sum(b_c, 1))
    p_c = c + o_m[:, None] * N + o_n[None, :]
    if WITH == "a mask of rows":
        tl.store(p_c, b_c, mask=(o_m < n)[:, None])
    else:
        tl.store(p_c, b_c)


@triton.jit
def modulo(x, y, n, BLOCK: tl.constexpr):
    """`%` of an int tile has no vector instruction: the compiler loops over the elements."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o, mask=o < n, other=0)
    tl.store(y + o, b_x % 7, mask=o < n)


@triton.jit
def compare_int64(x, y, BLOCK: tl.constexpr):
    """A compare of an int64 tile, which the vector unit does not have."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    tl.store(y + o, tl.where(b_x < 5, 1.0, 2.0))


@triton.jit
def compare_int32(x, y, n, BLOCK: tl.constexpr):
    """An order compare of an int32 tile: vector code with ascendnpu-ir 1.2.0, scalar code with 1.0.0."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    tl.store(y + o, tl.where(b_x < n, 1.0, 2.0))


@triton.jit
def reversed_mask(x, y, n, BLOCK: tl.constexpr):
    """`n > o` is no structured mask: the load reads the whole block, the store reads, selects and writes it back."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o, mask=n > o, other=0.0)
    tl.store(y + o, b_x + 1.0, mask=n > o)


@triton.jit
def gather(x, index, y, BLOCK: tl.constexpr):
    """Element gather through a tile of indices: one scalar load per element."""
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + tl.load(index + o)))


@triton.jit
def float64(x, y, BLOCK: tl.constexpr):
    """Float64 tiles do not exist on the machine."""
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o) * 2)


@triton.jit
def row_gather(x, index, y, ROWS: tl.constexpr, D: tl.constexpr):
    """Gather of rows through a tile of indices: one scalar read of the tile and one transfer per row."""
    o, d = tl.arange(0, ROWS), tl.arange(0, D)
    rows = tl.load(index + o)
    b_x = tl.load(x + rows[:, None] * D + d[None, :])
    tl.store(y + o[:, None] * D + d[None, :], b_x)


@triton.jit
def row_sums(x, y, ROWS: tl.constexpr, D: tl.constexpr):
    """A loop of known length, and a scalar made of a tile in it."""
    d = tl.arange(0, D)
    total = 0.0
    for i in range(ROWS):
        total += tl.sum(tl.load(x + i * D + d), 0)
    tl.store(y, total)


@triton.jit
def strided(x, y, stride, BLOCK: tl.constexpr):
    """A load whose neighbours lie apart in memory."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o * stride)
    tl.store(y + o, b_x)


@triton.jit
def locked(x, y, z, BLOCK: tl.constexpr):
    """An atomic whose result is used: ascendnpu-ir 1.2.0 makes it a lock around load, add and store."""
    o = tl.arange(0, BLOCK)
    before = tl.atomic_add(y + o, tl.load(x + o))
    tl.store(z + o, before)


@triton.jit
def running_sum(x, y, BLOCK: tl.constexpr):
    """A scan along the last axis has no vector form."""
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.cumsum(tl.load(x + o), 0))


@triton.jit
def two_types(x, y, BLOCK: tl.constexpr):
    """Refused by the Triton front end: a dot needs two operands of one type."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o[:, None] * BLOCK + o[None, :])
    tl.store(y + o[:, None] * BLOCK + o[None, :], tl.dot(b_x, b_x.to(tl.float16)))


@triton.jit
def flipped(x, y, BLOCK: tl.constexpr):
    """The device template of a flip loops over elements."""
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.flip(tl.load(x + o), 0))


@triton.jit
def transposed(x, y, stride, BLOCK: tl.constexpr):
    """A tile read along its columns with a stride known at run time: copied by the scalar unit."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o[:, None] + o[None, :] * stride)
    tl.store(y + o[:, None] * BLOCK + o[None, :], b_x)
