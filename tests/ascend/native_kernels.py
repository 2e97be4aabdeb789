"""Tiny kernels, one per thing that native code must get right."""

import triton
import triton.language as tl


@triton.jit
def scale_rows(x, w, y, T, D: tl.constexpr, BT: tl.constexpr):
    o_d = tl.arange(0, D)
    for i in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        o_t = i * BT + tl.arange(0, BT)
        m_t = o_t < T
        b_x = tl.load(x + o_t[:, None] * D + o_d[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_w = tl.load(w + o_t, mask=m_t, other=0.0).to(tl.float32)
        b_y = (b_x * b_w[:, None]).to(y.dtype.element_ty)
        tl.store(y + o_t[:, None] * D + o_d[None, :], b_y, mask=m_t[:, None])


@triton.jit
def scale_rows_unmasked(x, w, y, T, D: tl.constexpr, BT: tl.constexpr):
    o_d = tl.arange(0, D)
    for i in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        o_t = i * BT + tl.arange(0, BT)
        b_x = tl.load(x + o_t[:, None] * D + o_d[None, :]).to(tl.float32)
        b_w = tl.load(w + o_t).to(tl.float32)
        b_y = (b_x * b_w[:, None]).to(y.dtype.element_ty)
        tl.store(y + o_t[:, None] * D + o_d[None, :], b_y, mask=(o_t < T)[:, None])


@triton.jit
def shift_left_unmasked(x, y, T, distance, BT: tl.constexpr):
    o_t = tl.arange(0, BT)
    tl.store(y + o_t, tl.load(x + o_t - distance), mask=o_t < T)


@triton.jit
def copy_where(x, m, y, T, BT: tl.constexpr):
    o_t = tl.arange(0, BT)
    chosen = tl.load(m + o_t, mask=o_t < T, other=0) != 0
    tl.store(y + o_t, tl.load(x + o_t, mask=chosen, other=0.0), mask=chosen)


@triton.jit
def cast(x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.load(x + o).to(y.dtype.element_ty))


@triton.jit
def add(x, z, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.load(x + o) + tl.load(z + o))


@triton.jit
def elementary(x, y, N: tl.constexpr, FUNCTION: tl.constexpr):
    for i in range(tl.program_id(0), tl.num_programs(0)):
        o = i * N + tl.arange(0, N)
        b_x = tl.load(x + o)
        if FUNCTION == "exp":
            b_y = tl.exp(b_x)
        elif FUNCTION == "exp2":
            b_y = tl.exp2(b_x)
        elif FUNCTION == "log":
            b_y = tl.log(b_x)
        elif FUNCTION == "log2":
            b_y = tl.log2(b_x)
        elif FUNCTION == "sqrt":
            b_y = tl.sqrt(b_x)
        elif FUNCTION == "rsqrt":
            b_y = tl.rsqrt(b_x)
        elif FUNCTION == "sigmoid":
            b_y = tl.sigmoid(b_x)
        elif FUNCTION == "erf":
            b_y = tl.erf(b_x)
        elif FUNCTION == "abs":
            b_y = tl.abs(b_x)
        elif FUNCTION == "tanh":
            b_y = tl.math.tanh(b_x)
        elif FUNCTION == "sin":
            b_y = tl.sin(b_x)
        elif FUNCTION == "floor":
            b_y = tl.floor(b_x)
        tl.store(y + o, b_y)


@triton.jit
def reduce(x, y, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, KIND: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_x = tl.load(x + o_m[:, None] * N + o_n[None, :])
    if KIND == "sum":
        b_y = tl.sum(b_x, AXIS)
    elif KIND == "max":
        b_y = tl.max(b_x, AXIS)
    else:
        b_y = tl.min(b_x, AXIS)
    if AXIS == 0:
        tl.store(y + o_n, b_y)
    else:
        tl.store(y + o_m, b_y)


@triton.jit
def weighted_sum(x, w, y, T, BT: tl.constexpr, D: tl.constexpr):
    o_t, o_d = tl.arange(0, BT), tl.arange(0, D)
    for i in range(tl.program_id(0), T, tl.num_programs(0)):
        b_x = tl.load(x + i * BT * D + o_t[:, None] * D + o_d[None, :]).to(tl.float32)
        b_w = tl.load(w + o_t).to(tl.float32)
        tl.store(y + i * D + o_d, tl.sum(b_x * b_w[:, None], 0).to(y.dtype.element_ty))


@triton.jit
def matmul(a, b, c, T, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    for i in range(tl.program_id(0), T, tl.num_programs(0)):
        b_a = tl.load(a + i * M * K + o_m[:, None] * K + o_k[None, :])
        if TRANSPOSED:
            b_b = tl.trans(tl.load(b + o_n[:, None] * K + o_k[None, :]))
        else:
            b_b = tl.load(b + o_k[:, None] * N + o_n[None, :])
        tl.store(c + i * M * N + o_m[:, None] * N + o_n[None, :], tl.dot(b_a, b_b))


@triton.jit
def transpose(x, y, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_x = tl.load(x + o_m[:, None] * N + o_n[None, :])
    tl.store(y + o_n[:, None] * M + o_m[None, :], tl.trans(b_x))


@triton.jit
def attention(q, k, v, o, T, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    o_d = tl.arange(0, D)
    for i in range(tl.program_id(0), tl.cdiv(T, BM), tl.num_programs(0)):
        o_m = i * BM + tl.arange(0, BM)
        m_m = o_m < T
        b_q = tl.load(q + o_m[:, None] * D + o_d[None, :], mask=m_m[:, None], other=0.0)
        acc = tl.zeros([BM, D], tl.float32)
        high = tl.full([BM], -1e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        for j in range(0, tl.cdiv(T, BN)):
            o_n = j * BN + tl.arange(0, BN)
            m_n = o_n < T
            b_k = tl.load(k + o_n[:, None] * D + o_d[None, :], mask=m_n[:, None], other=0.0)
            b_v = tl.load(v + o_n[:, None] * D + o_d[None, :], mask=m_n[:, None], other=0.0)
            s = tl.where(m_n[None, :], tl.dot(b_q, tl.trans(b_k)) * scale, -1e30)
            higher = tl.maximum(high, tl.max(s, 1))
            p = tl.exp(s - higher[:, None])
            a = tl.exp(high - higher)
            total = total * a + tl.sum(p, 1)
            acc = acc * a[:, None] + tl.dot(p.to(b_v.dtype), b_v)
            high = higher
        acc = acc / total[:, None]
        tl.store(o + o_m[:, None] * D + o_d[None, :], acc.to(o.dtype.element_ty), mask=m_m[:, None])


@triton.jit
def slices(x, y, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n, o_h = tl.arange(0, M), tl.arange(0, N), tl.arange(0, N // 2)
    b_x = tl.load(x + o_m[:, None] * N + o_n[None, :])
    left = tl.extract_slice(b_x, (0, 0), (M, N // 2), (1, 1))
    right = tl.extract_slice(b_x, (0, N // 2), (M, N // 2), (1, 1))
    tl.store(y + o_m[:, None] * (N // 2) + o_h[None, :], left - right)


@triton.jit
def partial_sums(x, n, y, B, N: tl.constexpr):
    """Loops with run-time bounds that carry a tensor, one inside the other, and scalar loads."""
    o = tl.arange(0, N)
    for i in range(tl.program_id(0), B, tl.num_programs(0)):
        count = tl.load(n + i)
        total = tl.zeros([N], tl.float32)
        for j in range(0, count):
            inner = tl.zeros([N], tl.float32)
            for k in range(0, j + 1):
                inner += tl.load(x + k * N + o)
            total += inner
        tl.store(y + i * N + o, total)


@triton.jit
def collatz(n, steps, B):
    for i in range(tl.program_id(0), B, tl.num_programs(0)):
        value = tl.load(n + i)
        count = value * 0
        while value != 1:
            value = tl.where(value % 2 == 0, value // 2, 3 * value + 1)
            count += 1
        tl.store(steps + i, count)


@triton.jit
def swap(x, y, T, N: tl.constexpr):
    """Two carried tensors change places in every iteration: their buffers must not be confused."""
    o = tl.arange(0, N)
    first, second = tl.load(x + o), tl.load(x + N + o)
    for _ in range(0, T):
        first, second = second + 1.0, first
    tl.store(y + o, first)
    tl.store(y + N + o, second)


@triton.jit
def far(x, y, offset, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.load(x + offset + o) + tl.load(x + o))
    tl.store(x + offset + o, tl.load(y + o) + 1)


@triton.jit
def choose(m, x, z, y, N: tl.constexpr, T):
    o = tl.arange(0, N)
    b_m = tl.load(m + o, mask=o < T, other=0) != 0
    chosen = tl.where(b_m, tl.load(x + o, mask=o < T, other=0), tl.load(z + o, mask=o < T, other=0))
    tl.store(y + o, chosen, mask=o < T)


@triton.jit
def mask_reused(x, y, z, T, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_x = tl.load(x + o_m[:, None] * N + o_n[None, :])
    low = b_x < 0.0
    count = tl.sum(low.to(tl.int32), 1)
    kept = tl.where(low & (o_n < T)[None, :], b_x, 0.0)
    tl.store(y + o_m[:, None] * N + o_n[None, :], kept)
    tl.store(z + o_m, count)


@triton.jit
def sort(x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.sort(tl.load(x + o)))


@triton.jit
def cumsum(x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.cumsum(tl.load(x + o), 0))


@triton.jit
def device_print(x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.device_print("x", tl.load(x + o))
    tl.store(y + o, tl.load(x + o))


@triton.jit
def gather_rows(x, rows, y, M: tl.constexpr, N: tl.constexpr):
    """One scalar row number and one contiguous load at a time; then all at once, by a tile of pointers."""
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    for m in range(M):
        row = tl.load(rows + m)
        if row >= 0:
            tl.store(y + m * N + o_n, tl.load(x + row.to(tl.int64) * N + o_n))
    many = tl.load(rows + o_m)
    b_x = tl.load(x + many[:, None] * N + o_n[None, :], mask=(many >= 0)[:, None], other=0.0)
    tl.store(y + M * N + o_m[:, None] * N + o_n[None, :], b_x)


@triton.jit
def inserted(x, y, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_y = tl.zeros([M, N], tl.float32)
    for m in range(M):
        b_y = tl.insert_slice(b_y, tl.load(x + m * N + o_n)[None, :], (M - 1 - m, 0), (1, N), (1, 1))
    tl.store(y + o_m[:, None] * N + o_n[None, :], b_y)


@triton.jit
def best(x, y, z, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    value, index = tl.max(tl.load(x + o_m[:, None] * N + o_n[None, :]), 1, return_indices=True)
    tl.store(y + o_m, value)
    tl.store(z + o_m, index)


@triton.jit
def grouped_sum(x, y, total, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_x = tl.load(x + o_m[:, None] * N + o_n[None, :])
    tl.store(y + tl.arange(0, M // G)[:, None] * N + o_n[None, :], tl.sum(tl.reshape(b_x, (M // G, G, N)), 1))
    tl.store(total, tl.sum(b_x))


@triton.jit
def dot_under_condition(x, take, y, B, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros([M, M], tl.float32)
    for i in range(0, B):
        if tl.load(take + i) != 0:
            b_x = tl.load(x + o_m[:, None] * N + o_n[None, :])
            acc += tl.dot(b_x, tl.trans(b_x))
        else:
            acc = acc * 2
    tl.store(y + o_m[:, None] * M + o_m[None, :], acc)


@triton.jit
def wrong(x, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(x + o, tl.load(x + o).no_such_method())


@triton.jit
def count_programs(seen):
    tl.store(seen + tl.program_id(0), tl.load(seen + tl.program_id(0)) + tl.num_programs(0))
