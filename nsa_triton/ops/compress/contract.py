"""What a legal call of compress is, and how many rows it returns."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import check, mode_in_force
from nsa_triton.ops._common import arguments
from nsa_triton.ops._common.arguments import Meta
from nsa_triton.ops._common.implementation import check_impl
from nsa_triton.ops._common.lengths import check_prefix_ends, host_ints

LENGTHS = "actual_seq_len"


def check_call(
    tensors: dict[str, Any],
    compress_block_size: Any,
    compress_stride: Any,
    actual_seq_len: Any,
    impl: Any,
    *,
    leading_zero: bool = False,
) -> tuple[int, ...]:
    """Check a public call, types first, and return its prefix sums.

    `tensors` are input, weight and, for the gradient, grad; `leading_zero` allows an empty first segment.
    """
    if torch.compiler.is_compiling():  # Dynamo cannot trace the checks below; the registered operators make them too
        if not isinstance(actual_seq_len, (list, tuple)):
            raise ArgumentTypeError(
                LENGTHS, "a list or tuple of ints under torch.compile", type(actual_seq_len).__name__
            )
        return tuple(actual_seq_len)
    for name, tensor in tensors.items():
        arguments.check_tensor(name, tensor)
    arguments.check_int("compress_block_size", compress_block_size)
    arguments.check_int("compress_stride", compress_stride)
    check_impl(impl)
    ends = host_ints(actual_seq_len, LENGTHS)
    mode = mode_in_force()
    checked_rows(compress_block_size, compress_stride, ends, **tensors, leading_zero=leading_zero, mode=mode)
    return ends


def checked_rows(
    compress_block_size: int,
    compress_stride: int,
    ends: tuple[int, ...],
    input: Tensor,
    weight: Tensor,
    grad: Tensor | None = None,
    *,
    leading_zero: bool = True,
    mode: str = "structural",
) -> int:
    """Check dtypes, devices, shapes, lengths and limits, once for each kind of call; return T'."""
    metas = {"input": input, "weight": weight, "grad": grad}
    call = tuple((name, Meta.of(tensor)) for name, tensor in metas.items() if tensor is not None)
    numbers = (*ends, *(size for _, meta in call for size in meta.shape))
    # The symbolic ints of torch.compile have no value to cache by.
    function = _checked_rows_once if set(map(type, numbers)) == {int} else _checked_rows
    return function(compress_block_size, compress_stride, ends, call, leading_zero, mode)


def _checked_rows(
    compress_block_size: int,
    compress_stride: int,
    ends: tuple[int, ...],
    call: tuple[tuple[str, Meta], ...],
    leading_zero: bool,
    mode: str,
) -> int:
    (_, input), (_, weight), *grad = call
    for name, meta in call[1:]:
        arguments.check_same_dtype(name, meta, "input", input)
    check("nsa_compress", {"dtype": input.dtype}, mode)
    for name, meta in call[1:]:
        arguments.check_same_device(name, meta, "input", input)
    arguments.check_rank("input", input, "[T, N, D]")
    arguments.check_rank("weight", weight, "[compress_block_size, N]")
    check_prefix_ends(ends, LENGTHS, leading_zero)
    tokens, heads, head_size = input.shape
    given = {
        "compress_block_size": compress_block_size,
        "compress_stride": compress_stride,
        "T": tokens,
        "N": heads,
        "D": head_size,
        "weight.shape[0]": weight.shape[0],
        "weight.shape[1]": weight.shape[1],
        "actual_seq_len[-1]": ends[-1],
    }
    check("nsa_compress", given, mode)
    rows = output_rows(compress_block_size, compress_stride, ends)
    for _, meta in grad:
        if tuple(meta.shape) != (rows, heads, head_size):
            expected = f"{[rows, heads, head_size]}, the shape of the output"
            raise ArgumentValueError("grad.shape", expected, list(meta.shape), "Pass the integers of the forward call")
    return rows


_checked_rows_once = functools.lru_cache(maxsize=128)(_checked_rows)


def output_rows(compress_block_size: int, compress_stride: int, ends: tuple[int, ...]) -> int:
    """T', the number of windows in all segments."""
    rows, begin = 0, 0
    for end in ends:
        windows = (end - begin - compress_block_size) // compress_stride + 1
        rows += torch.sym_max(0, windows)  # type: ignore[no-untyped-call]
        begin = end
    return rows
