"""Kernels that several ops launch."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_parts", "size"])
def sum_parts(
    parts,  # [n_parts, size] float32
    out,  # [size]
    n_parts,
    size,
    BP: tl.constexpr,  # parts per step
    BE: tl.constexpr,  # elements per item
):
    """The parts, added in a fixed order."""
    o_p = tl.arange(0, BP)
    o_e = tl.arange(0, BE)
    for i_e in range(tl.program_id(0) * BE, size, tl.num_programs(0) * BE):
        b_acc = tl.zeros([BP, BE], tl.float32)
        for i_p in range(0, n_parts, BP):
            m_part = (o_p < n_parts - i_p)[:, None] & (o_e < size - i_e)[None, :]
            p_part = parts + i_p.to(tl.int64) * size + i_e
            b_acc += tl.load(p_part + o_p[:, None] * size + o_e[None, :], mask=m_part, other=0.0)
        tl.store(out + i_e + o_e, tl.sum(b_acc, axis=0).to(out.dtype.element_ty), mask=o_e < size - i_e)
