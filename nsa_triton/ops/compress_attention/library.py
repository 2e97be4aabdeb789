"""The registered operators nsa_triton::compress_attention and nsa_triton::compress_attention_grad.

They check shapes and lengths themselves: torch.ops and graphs made by torch.compile do not come through the checks of
api.py. The gradient is that of the attention alone, the first output, and it can be had once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentValueError
from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.arguments import check_importance
from nsa_triton.ops._common.dense import with_dense_rows
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.ragged_contract import STATISTICS
from nsa_triton.ops._common.registration import register
from nsa_triton.ops._common.statistics import STATE
from nsa_triton.ops.compress_attention import reference
from nsa_triton.ops.compress_attention.contract import MASKS, NUMBERS, TENSORS, check_call

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class Call(NamedTuple):
    """The arguments of the operator."""

    query: Tensor  # [T1, N1, Dk]
    key: Tensor  # [T2, N2, Dk]
    value: Tensor  # [T2, N2, Dv]
    atten_mask: Tensor | None  # [queries, keys]
    topk_mask: Tensor | None  # [queries, blocks]
    query_ends: list[int]
    key_ends: list[int]
    scale: float
    compress_block_size: int
    compress_stride: int
    select_block_size: int
    select_block_count: int
    causal: bool
    num_init_blocks: int
    num_local_blocks: int
    importance: str
    impl: str


class GradCall(NamedTuple):
    """The arguments of the gradient."""

    grad: Tensor  # [T1, N1, Dv]
    query: Tensor
    key: Tensor
    value: Tensor
    attention_out: Tensor
    softmax_max: Tensor  # [T1, N1, 8]
    softmax_sum: Tensor
    atten_mask: Tensor | None
    query_ends: list[int]
    key_ends: list[int]
    scale: float
    compress_block_size: int
    compress_stride: int
    causal: bool
    impl: str


def _compress_attention(*arguments: Any) -> Outputs:
    call = Call(*arguments)
    _check(call, "structural")
    if call.query.shape[0] == 0:
        return _outputs(call)
    arrays = _canonical(call)
    return run(
        call.impl,
        call.query.dtype,
        kernels=lambda: launcher("compress_attention").forward(*arrays),
        reference=lambda: reference.forward(*arrays),
        argument="query",
    )


def _compress_attention_fake(*arguments: Any) -> Outputs:
    call = Call(*arguments)
    _check(call, mode_in_force())
    return _outputs(call)


def _outputs(call: Call) -> Outputs:
    query, value = call.query, call.value
    ids = query.new_empty((query.shape[0], value.shape[1], call.select_block_count), dtype=torch.int32)
    largest, total = (query.new_empty((*query.shape[:2], STATE), dtype=torch.float32) for _ in range(2))
    return query.new_empty((*query.shape[:2], value.shape[2])), ids, largest, total


def _compress_attention_grad(*arguments: Any) -> Gradients:
    call = GradCall(*arguments)
    _check(call, "structural")
    if call.query.shape[0] == 0:
        return _gradients(call, torch.Tensor.new_zeros)
    arrays = _canonical(call)
    return run(
        call.impl,
        call.query.dtype,
        kernels=lambda: launcher("compress_attention").backward(*arrays),
        reference=lambda: reference.backward(*arrays),
        argument="query",
    )


def _compress_attention_grad_fake(*arguments: Any) -> Gradients:
    call = GradCall(*arguments)
    _check(call, mode_in_force())
    return _gradients(call, torch.Tensor.new_empty)


def _gradients(call: GradCall, new: Callable[..., Tensor]) -> Gradients:
    query_grad, key_grad, value_grad = (new(tensor, tensor.shape) for tensor in (call.query, call.key, call.value))
    return query_grad, key_grad, value_grad


def _check(call: Call | GradCall, mode: str) -> None:
    if isinstance(call, Call):
        check_importance(call.importance)
    given = call._asdict()
    tensors = {name: given[name] for name in (*TENSORS, *MASKS) if name in given}
    numbers = {name: int(given[name]) for name in NUMBERS if name in given}
    check_call(tensors, tuple(call.query_ends), tuple(call.key_ends), numbers, mode=mode)


def _canonical(call: Call | GradCall) -> tuple[Any, ...]:
    """The arguments but impl as kernels want them: rows of consecutive elements, masks of bytes, and tuples."""
    parts = call._asdict()
    del parts["impl"]
    for name, part in parts.items():
        if isinstance(part, Tensor):
            dense = part.contiguous() if name in STATISTICS else with_dense_rows(part)
            parts[name] = dense.view(torch.uint8) if dense.dtype == torch.bool else dense  # the same bytes
    return tuple(tuple(part) if isinstance(part, list) else part for part in parts.values())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    call = Call(*inputs)
    out, *others = output
    ctx.mark_non_differentiable(*others)
    _, *statistics = others
    ctx.save_for_backward(call.query, call.key, call.value, out, *statistics, call.atten_mask)
    ctx.lengths = (call.query_ends, call.key_ends)
    ctx.rest = (call.scale, call.compress_block_size, call.compress_stride, call.causal, call.impl)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = compress_attention_grad(grad, *ctx.saved_tensors, *ctx.lengths, *ctx.rest)
    return (*gradients, *(None for _ in Call._fields[3:]))


def _second_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    raise ArgumentValueError("create_graph", "False: nsa_compress_attention is differentiable once", True)


_TENSORS = "Tensor query, Tensor key, Tensor value"
_ENDS = "SymInt[] query_ends, SymInt[] key_ends"
_WINDOWS = "float scale, int compress_block_size, int compress_stride"

compress_attention: Callable[..., Outputs] = register(
    "compress_attention",
    f"({_TENSORS}, Tensor? atten_mask, Tensor? topk_mask, {_ENDS}, {_WINDOWS}, int select_block_size,"
    " int select_block_count, bool causal, int num_init_blocks, int num_local_blocks, str importance, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _compress_attention,
    _compress_attention_fake,
    setup_context=_save,
    backward=_backward,
)
compress_attention_grad: Callable[..., Gradients] = register(
    "compress_attention_grad",
    f"(Tensor grad, {_TENSORS}, Tensor attention_out, Tensor softmax_max, Tensor softmax_sum, Tensor? atten_mask,"
    f" {_ENDS}, {_WINDOWS}, bool causal, str impl) -> (Tensor, Tensor, Tensor)",
    _compress_attention_grad,
    _compress_attention_grad_fake,
    backward=_second_backward,
)
