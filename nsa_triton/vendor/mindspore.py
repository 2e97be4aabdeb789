"""The contract of mindspore.ops, on torch tensors: stricter, with exactly the documented exception classes."""

from __future__ import annotations

from torch import Tensor

from nsa_triton.errors import ArgumentTypeError
from nsa_triton.limits import limits
from nsa_triton.ops.compress import api


def nsa_compress(
    input: Tensor,
    weight: Tensor,
    compress_block_size: int,
    compress_stride: int,
    *,
    actual_seq_len: tuple[int, ...] | list[int],
) -> Tensor:
    """mindspore.ops.nsa_compress: float16 and bfloat16 only, prefix sums as a tuple or list of positive ints.

    Raises TypeError for wrong types and dtypes; once these are right, RuntimeError for wrong shapes and values.
    """
    if not isinstance(actual_seq_len, (tuple, list)) or not set(map(type, actual_seq_len)) <= {int}:
        raise ArgumentTypeError("actual_seq_len", "a tuple or list of ints", repr(actual_seq_len))
    with limits("documented"):
        return api.nsa_compress(input, weight, compress_block_size, compress_stride, actual_seq_len=actual_seq_len)
