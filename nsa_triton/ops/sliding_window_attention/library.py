"""The registered operators nsa_triton::sliding_window_attention and nsa_triton::sliding_window_attention_grad.

They check shapes and values themselves: a graph made by torch.compile does not come through the checks of api.py. The
gradient of the first is the second, which has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.dense import with_dense_rows
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import register
from nsa_triton.ops.sliding_window_attention import reference
from nsa_triton.ops.sliding_window_attention.contract import check_call

Outputs = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class Rest(NamedTuple):
    """The arguments that both operators have behind their tensors."""

    query_ends: list[int]
    key_ends: list[int]
    scale: float
    window_size: int
    impl: str


class Forward(NamedTuple):
    query: Tensor  # [T1, N1, Dk]
    key: Tensor  # [T2, N2, Dk]
    value: Tensor  # [T2, N2, Dv]


class Backward(NamedTuple):
    grad: Tensor  # [T1, N1, Dv]
    query: Tensor
    key: Tensor
    value: Tensor
    attention_out: Tensor  # [T1, N1, Dv]
    lse: Tensor  # [T1, N1] float32


Tensors = Forward | Backward


def _sliding_window_attention(*arguments: Any) -> Outputs:
    tensors, rest = Forward(*arguments[:3]), Rest(*arguments[3:])
    _check(tensors, rest, "structural")
    if tensors.query.shape[0] == 0:
        return _outputs(tensors)
    call = _canonical(tensors, rest)

    def specification() -> Outputs:
        out, lse = reference.forward(*call)
        return out, lse.float().t().contiguous().t()

    return run(
        rest.impl,
        tensors.query.dtype,
        kernels=lambda: launcher("sliding_window_attention").forward(*call),
        reference=specification,
        argument="query",
    )


def _sliding_window_attention_fake(*arguments: Any) -> Outputs:
    tensors = Forward(*arguments[:3])
    _check(tensors, Rest(*arguments[3:]), mode_in_force())
    return _outputs(tensors)


def _outputs(tensors: Forward) -> Outputs:
    """The log-sum-exp lies head after head, as kernels write and read it."""
    query = tensors.query
    tokens, heads, _ = query.shape
    lse = query.new_empty((heads, tokens), dtype=torch.float32).t()
    return query.new_empty((tokens, heads, tensors.value.shape[2])), lse


def _sliding_window_attention_grad(*arguments: Any) -> Gradients:
    tensors, rest = Backward(*arguments[:6]), Rest(*arguments[6:])
    _check(tensors, rest, "structural")
    if tensors.query.shape[0] == 0:
        return _gradients(tensors, torch.Tensor.new_zeros)
    call = _canonical(tensors, rest)
    return run(
        rest.impl,
        tensors.query.dtype,
        kernels=lambda: launcher("sliding_window_attention").backward(*call),
        reference=lambda: reference.backward(*call),
        argument="query",
    )


def _sliding_window_attention_grad_fake(*arguments: Any) -> Gradients:
    tensors = Backward(*arguments[:6])
    _check(tensors, Rest(*arguments[6:]), mode_in_force())
    return _gradients(tensors, torch.Tensor.new_empty)


def _gradients(tensors: Backward, new: Callable[..., Tensor]) -> Gradients:
    query_grad, key_grad, value_grad = (new(tensor, tensor.shape) for tensor in tensors[1:4])
    return query_grad, key_grad, value_grad


def _check(tensors: Tensors, rest: Rest, mode: str) -> None:
    numbers = {"window_size": rest.window_size}
    check_call(tensors._asdict(), tuple(rest.query_ends), tuple(rest.key_ends), numbers, mode=mode)


def _canonical(tensors: Tensors, rest: Rest) -> tuple[Any, ...]:
    """The arguments but impl as kernels want them: rows of consecutive elements, and tuples."""
    parts = {name: tensor if name == "lse" else with_dense_rows(tensor) for name, tensor in tensors._asdict().items()}
    return (*parts.values(), tuple(rest.query_ends), tuple(rest.key_ends), rest.scale, rest.window_size)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    query, key, value, *rest = inputs
    ctx.save_for_backward(query, key, value, out, lse)
    ctx.rest = tuple(rest)


@once_differentiable
def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = sliding_window_attention_grad(grad, *ctx.saved_tensors, *ctx.rest)
    return (*gradients, *(None for _ in ctx.rest))


_REST = "SymInt[] query_ends, SymInt[] key_ends, float scale, int window_size, str impl"

sliding_window_attention: Callable[..., Outputs] = register(
    "sliding_window_attention",
    f"(Tensor query, Tensor key, Tensor value, {_REST}) -> (Tensor, Tensor)",
    _sliding_window_attention,
    _sliding_window_attention_fake,
    setup_context=_save,
    backward=_backward,
)
sliding_window_attention_grad: Callable[..., Gradients] = register(
    "sliding_window_attention_grad",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor attention_out, Tensor lse,"
    f" {_REST}) -> (Tensor, Tensor, Tensor)",
    _sliding_window_attention_grad,
    _sliding_window_attention_grad_fake,
)
