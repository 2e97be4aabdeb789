"""The registered operators nsa_triton::select_attention and nsa_triton::select_attention_grad.

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
from nsa_triton.ops._common.indices import as_int32
from nsa_triton.ops._common.registration import register
from nsa_triton.ops._common.statistics import STATE
from nsa_triton.ops.select_attention import reference
from nsa_triton.ops.select_attention.contract import check_call, refuse_bad_ids
from nsa_triton.settings import settings

Outputs = tuple[Tensor, Tensor, Tensor]


class Rest(NamedTuple):
    """The arguments that both operators have behind their tensors."""

    query_ends: list[int]
    key_ends: list[int]
    scale: float
    select_block_size: int
    causal: bool
    impl: str


class Forward(NamedTuple):
    query: Tensor  # [T1, N1, Dk]
    key: Tensor  # [T2, N2, Dk]
    value: Tensor  # [T2, N2, Dv]
    topk_indices: Tensor  # [T1, N2, K]


class Backward(NamedTuple):
    grad: Tensor  # [T1, N1, Dv]
    query: Tensor
    key: Tensor
    value: Tensor
    attention_out: Tensor  # [T1, N1, Dv]
    softmax_max: Tensor  # [T1, N1, 8] float32
    softmax_sum: Tensor
    topk_indices: Tensor


Tensors = Forward | Backward


def _select_attention(*arguments: Any) -> Outputs:
    tensors, rest = Forward(*arguments[:4]), Rest(*arguments[4:])
    _check(tensors, rest, "structural")
    if tensors.query.shape[0] == 0 or tensors.query.shape[1] == 0:
        return _outputs(tensors)
    call = _canonical(tensors, rest)

    def specification() -> Outputs:
        out, softmax_max, softmax_sum = reference.forward(*call)
        return out, softmax_max.float(), softmax_sum.float()

    return run(
        rest.impl,
        tensors.query.dtype,
        kernels=lambda: launcher("select_attention").forward(*call),
        reference=specification,
        argument="query",
    )


def _select_attention_fake(*arguments: Any) -> Outputs:
    tensors = Forward(*arguments[:4])
    _check(tensors, Rest(*arguments[4:]), mode_in_force())
    return _outputs(tensors)


def _outputs(tensors: Forward) -> Outputs:
    query = tensors.query
    softmax_max, softmax_sum = (query.new_empty((*query.shape[:2], STATE), dtype=torch.float32) for _ in range(2))
    return query.new_empty((*query.shape[:2], tensors.value.shape[2])), softmax_max, softmax_sum


def _select_attention_grad(*arguments: Any) -> Outputs:
    tensors, rest = Backward(*arguments[:8]), Rest(*arguments[8:])
    _check(tensors, rest, "structural")
    if tensors.query.shape[0] == 0 or tensors.query.shape[1] == 0:
        return _gradients(tensors, torch.Tensor.new_zeros)
    call = _canonical(tensors, rest)
    return run(
        rest.impl,
        tensors.query.dtype,
        kernels=lambda: launcher("select_attention").backward(*call),
        reference=lambda: reference.backward(*call),
        argument="query",
    )


def _select_attention_grad_fake(*arguments: Any) -> Outputs:
    tensors = Backward(*arguments[:8])
    _check(tensors, Rest(*arguments[8:]), mode_in_force())
    return _gradients(tensors, torch.Tensor.new_empty)


def _gradients(tensors: Backward, new: Callable[..., Tensor]) -> Outputs:
    query_grad, key_grad, value_grad = (new(tensor, tensor.shape) for tensor in tensors[1:4])
    return query_grad, key_grad, value_grad


def _check(tensors: Tensors, rest: Rest, mode: str) -> None:
    numbers = {"select_block_size": rest.select_block_size}
    check_call(tensors._asdict(), tuple(rest.query_ends), tuple(rest.key_ends), numbers, mode=mode)


def _canonical(tensors: Tensors, rest: Rest) -> tuple[Any, ...]:
    """The arguments as kernels want them: int32 ids side by side, rows of consecutive elements, and tuples."""
    *others, ids = tensors
    query_ends, key_ends = tuple(rest.query_ends), tuple(rest.key_ends)
    if settings().check_indices:
        refuse_bad_ids(ids, query_ends, key_ends, rest.select_block_size)
    rows = map(with_dense_rows, others)
    ids = as_int32("topk_indices", ids).contiguous()
    return (*rows, ids, query_ends, key_ends, rest.scale, rest.select_block_size, rest.causal)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    out, softmax_max, softmax_sum = output
    ctx.mark_non_differentiable(softmax_max, softmax_sum)
    query, key, value, topk_indices, *rest = inputs
    ctx.save_for_backward(query, key, value, out, softmax_max, softmax_sum, topk_indices)
    ctx.rest = tuple(rest)


@once_differentiable
def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = select_attention_grad(grad, *ctx.saved_tensors, *ctx.rest)
    return (*gradients, None, *(None for _ in ctx.rest))


_REST = "SymInt[] query_ends, SymInt[] key_ends, float scale, int select_block_size, bool causal, str impl"
_RESULTS = "(Tensor, Tensor, Tensor)"

select_attention: Callable[..., Outputs] = register(
    "select_attention",
    f"(Tensor query, Tensor key, Tensor value, Tensor topk_indices, {_REST}) -> {_RESULTS}",
    _select_attention,
    _select_attention_fake,
    setup_context=_save,
    backward=_backward,
)
select_attention_grad: Callable[..., Outputs] = register(
    "select_attention_grad",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor attention_out, Tensor softmax_max,"
    f" Tensor softmax_sum, Tensor topk_indices, {_REST}) -> {_RESULTS}",
    _select_attention_grad,
    _select_attention_grad_fake,
)
