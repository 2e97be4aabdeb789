"""Kernels of nsa_gated_combine: the gated sum of three branches, and its gradient, in one launch each.

    y  = sigmoid(z_0) c + sigmoid(z_1) s + sigmoid(z_2) w          for each row: a token's head
    dc = sigmoid(z_0) g,   dz_0 = sigmoid(z_0) sigmoid(-z_0) sum_d g[d] c[d];   the same for s with z_1 and w with z_2

Names: c compressed, s selected, w local (its window), z gates; R rows, D head size. A tile is BR rows long and BD
columns wide. The gates come with the branch first, [3, R]: those of a tile lie side by side. Of [R, 3] the NPU would
fetch three columns with a stride.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(b_z):
    return 1.0 / (1.0 + tl.exp(-b_z))


@triton.jit
def gate_at(p_z, o_r, m_r):
    # [BR]
    return tl.load(p_z + o_r, mask=m_r, other=0.0).to(tl.float32)


@triton.jit
def rows_at(p_x, o_r, o_d, x_r, m_x):
    # [BR, BD]
    return tl.load(p_x + o_r[:, None] * x_r + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows", "n_items"])
def gated_combine_fwd(
    c,  # [R, D]
    s,
    w,
    z,  # [3, R]
    y,  # [R, D]
    n_rows,
    n_items,
    c_r,  # strides
    s_r,
    w_r,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    o_r = tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    n_blocks = (D + BD - 1) // BD
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_tile, i_d = i_item // n_blocks * BR, i_item % n_blocks * BD
        i_r = i_tile.to(tl.int64)
        m_r = o_r < n_rows - i_tile
        m_x = m_r[:, None] & (o_d < D - i_d)[None, :]
        p_z = z + i_r
        b_y = sigmoid(gate_at(p_z, o_r, m_r))[:, None] * rows_at(c + i_r * c_r + i_d, o_r, o_d, c_r, m_x)
        p_z += n_rows
        b_y += sigmoid(gate_at(p_z, o_r, m_r))[:, None] * rows_at(s + i_r * s_r + i_d, o_r, o_d, s_r, m_x)
        p_z += n_rows
        b_y += sigmoid(gate_at(p_z, o_r, m_r))[:, None] * rows_at(w + i_r * w_r + i_d, o_r, o_d, w_r, m_x)
        p_y = y + i_r * D + i_d
        tl.store(p_y + o_r[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m_x)


@triton.jit
def branch_grad(p_x, p_dx, b_g, b_z, o_r, o_d, x_r, D: tl.constexpr, m_x):
    """Store the gradient of a branch; return this tile's part of sum_d g x, [BR]."""
    b_dx = sigmoid(b_z)[:, None] * b_g
    tl.store(p_dx + o_r[:, None] * D + o_d[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_x)
    return tl.sum(b_g * rows_at(p_x, o_r, o_d, x_r, m_x), axis=1)


@triton.jit
def store_gate_grad(p_dz, b_z, b_sum, o_r, m_r):
    # 1 - sigmoid(z), but exact for large z too
    b_dz = sigmoid(b_z) * sigmoid(-b_z) * b_sum
    tl.store(p_dz + o_r, b_dz.to(p_dz.dtype.element_ty), mask=m_r)


@triton.jit(do_not_specialize=["n_rows", "n_items"])
def gated_combine_bwd(
    g,  # [R, D]
    c,
    s,
    w,
    z,  # [3, R]
    dc,  # [R, D]
    ds,
    dw,
    dz,  # [3, R]
    n_rows,
    n_items,
    g_r,  # strides
    c_r,
    s_r,
    w_r,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    o_r = tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_r = (i_item * BR).to(tl.int64)
        m_r = o_r < n_rows - i_item * BR
        p_z = z + i_r
        b_zc = gate_at(p_z, o_r, m_r)
        b_zs = gate_at(p_z + n_rows, o_r, m_r)
        b_zw = gate_at(p_z + n_rows + n_rows, o_r, m_r)
        b_c = tl.zeros([BR], tl.float32)
        b_s = tl.zeros([BR], tl.float32)
        b_w = tl.zeros([BR], tl.float32)
        for i_d in range(0, D, BD):
            m_x = m_r[:, None] & (o_d < D - i_d)[None, :]
            b_g = rows_at(g + i_r * g_r + i_d, o_r, o_d, g_r, m_x)
            p_out = i_r * D + i_d
            b_c += branch_grad(c + i_r * c_r + i_d, dc + p_out, b_g, b_zc, o_r, o_d, c_r, D, m_x)
            b_s += branch_grad(s + i_r * s_r + i_d, ds + p_out, b_g, b_zs, o_r, o_d, s_r, D, m_x)
            b_w += branch_grad(w + i_r * w_r + i_d, dw + p_out, b_g, b_zw, o_r, o_d, w_r, D, m_x)
        p_dz = dz + i_r
        store_gate_grad(p_dz, b_zc, b_c, o_r, m_r)
        store_gate_grad(p_dz + n_rows, b_zs, b_s, o_r, m_r)
        store_gate_grad(p_dz + n_rows + n_rows, b_zw, b_w, o_r, m_r)
