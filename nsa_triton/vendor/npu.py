"""The functions of torch_npu: the same names, argument order and keyword-only arguments.

Unlike `nsa_compress`, and like CANN, `npu_nsa_compress` takes prefix sums with a leading 0, which is an empty first
segment. The attention and the paged operators have nothing to translate: both spellings are one function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nsa_triton.ops.compress import library
from nsa_triton.ops.compress.contract import check_call
from nsa_triton.ops.compress_attention import nsa_compress_attention
from nsa_triton.ops.compress_attention_infer import nsa_compress_attention_infer
from nsa_triton.ops.compress_infer import nsa_compress_infer
from nsa_triton.ops.select_attention import nsa_select_attention, nsa_select_attention_grad
from nsa_triton.ops.select_attention_infer import nsa_select_attention_infer

if TYPE_CHECKING:
    from nsa_triton.ops.compress.api import Lengths


def npu_nsa_compress(
    input: Tensor,
    weight: Tensor,
    compress_block_size: int,
    compress_stride: int,
    *,
    actual_seq_len: Lengths | None = None,
    impl: str = "auto",
) -> Tensor:
    """`nsa_compress` as torch_npu spells it; empty segments may come first. `actual_seq_len` is required."""
    tensors = {"input": input, "weight": weight}
    ends = check_call(tensors, compress_block_size, compress_stride, actual_seq_len, impl, leading_zero=True)
    return library.compress(input, weight, compress_block_size, compress_stride, ends, impl)


def npu_nsa_compress_grad(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    compress_block_size: int,
    compress_stride: int,
    *,
    actual_seq_len: Lengths | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`nsa_compress_grad` as torch_npu spells it; empty segments may come first. `actual_seq_len` is required."""
    tensors = {"grad": grad, "input": input, "weight": weight}
    ends = check_call(tensors, compress_block_size, compress_stride, actual_seq_len, impl, leading_zero=True)
    return library.compress_grad(grad, input, weight, compress_block_size, compress_stride, ends, impl)


npu_nsa_compress_infer = nsa_compress_infer
npu_nsa_compress_attention = nsa_compress_attention
npu_nsa_compress_attention_infer = nsa_compress_attention_infer
npu_nsa_select_attention = nsa_select_attention
npu_nsa_select_attention_grad = nsa_select_attention_grad
npu_nsa_select_attention_infer = nsa_select_attention_infer
