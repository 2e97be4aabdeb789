"""The registered operators nsa_triton::compress and nsa_triton::compress_grad.

They check values themselves: a graph made by torch.compile does not come through the checks of api.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import register
from nsa_triton.ops.compress import reference
from nsa_triton.ops.compress.contract import checked_rows

Gradients = tuple[Tensor, Tensor]


def _compress(input: Tensor, weight: Tensor, block_size: int, stride: int, lengths: list[int], impl: str) -> Tensor:
    ends = tuple(lengths)
    if checked_rows(block_size, stride, ends, input, weight) == 0:
        return input.new_empty((0, *input.shape[1:]))
    arguments = (input, weight, block_size, stride, ends)
    return run(
        impl,
        input.dtype,
        kernels=lambda: launcher("compress").forward(*arguments),
        reference=lambda: reference.forward(*arguments),
    )


def _compress_fake(
    input: Tensor, weight: Tensor, block_size: int, stride: int, lengths: list[int], impl: str
) -> Tensor:
    rows = checked_rows(block_size, stride, tuple(lengths), input, weight, mode=mode_in_force())
    return input.new_empty((rows, *input.shape[1:]))


def _compress_grad(
    grad: Tensor, input: Tensor, weight: Tensor, block_size: int, stride: int, lengths: list[int], impl: str
) -> Gradients:
    ends = tuple(lengths)
    if checked_rows(block_size, stride, ends, input, weight, grad) == 0:
        return input.new_zeros(input.shape), weight.new_zeros(weight.shape)
    arguments = (grad, input, weight, block_size, stride, ends)
    return run(
        impl,
        input.dtype,
        kernels=lambda: launcher("compress").backward(*arguments),
        reference=lambda: reference.backward(*arguments),
    )


def _compress_grad_fake(
    grad: Tensor, input: Tensor, weight: Tensor, block_size: int, stride: int, lengths: list[int], impl: str
) -> Gradients:
    checked_rows(block_size, stride, tuple(lengths), input, weight, grad, mode=mode_in_force())
    return input.new_empty(input.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, block_size, stride, lengths, impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.rest = (block_size, stride, lengths, impl)


def _compress_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input_grad, weight_grad = compress_grad(grad, *ctx.saved_tensors, *ctx.rest)
    return input_grad, weight_grad, None, None, None, None


def _compress_grad_backward(ctx: Any, of_input: Tensor, of_weight: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives: compress is linear in input and in weight, so they are made of the same two operators."""
    grad, input, weight = ctx.saved_tensors
    of_grad = compress(of_input, weight, *ctx.rest) + compress(input, of_weight, *ctx.rest)
    return of_grad, *compress_grad(grad, of_input, of_weight, *ctx.rest), None, None, None, None


_INTEGERS = "int compress_block_size, int compress_stride, SymInt[] actual_seq_len"

compress: Callable[..., Tensor] = register(
    "compress",
    f"(Tensor input, Tensor weight, {_INTEGERS}, str impl) -> Tensor",
    _compress,
    _compress_fake,
    setup_context=_save,
    backward=_compress_backward,
)
compress_grad: Callable[..., Gradients] = register(
    "compress_grad",
    f"(Tensor grad, Tensor input, Tensor weight, {_INTEGERS}, str impl) -> (Tensor, Tensor)",
    _compress_grad,
    _compress_grad_fake,
    setup_context=_save,
    backward=_compress_grad_backward,
)
