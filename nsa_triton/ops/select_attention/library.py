"""The registered operators nsa_triton::select_attention and nsa_triton::select_attention_grad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.indices import as_int32
from nsa_triton.ops._common.ragged_operator import (
    Direction,
    Gradients,
    New,
    gradients_of,
    register_ragged_attention,
    tensors_of,
    with_rows,
)
from nsa_triton.ops._common.statistics import STATE
from nsa_triton.ops.select_attention import reference
from nsa_triton.ops.select_attention.contract import check_call, refuse_bad_ids
from nsa_triton.settings import settings


class Call(NamedTuple):
    """The arguments of the operator."""

    query: Tensor  # [T1, N1, Dk]
    key: Tensor  # [T2, N2, Dk]
    value: Tensor  # [T2, N2, Dv]
    topk_indices: Tensor  # [T1, N2, K]
    query_ends: list[int]
    key_ends: list[int]
    scale: float
    select_block_size: int
    causal: bool
    impl: str


class GradCall(NamedTuple):
    """The arguments of the gradient."""

    grad: Tensor  # [T1, N1, Dv]
    query: Tensor
    key: Tensor
    value: Tensor
    attention_out: Tensor  # [T1, N1, Dv]
    softmax_max: Tensor  # [T1, N1, 8] float32
    softmax_sum: Tensor
    topk_indices: Tensor
    query_ends: list[int]
    key_ends: list[int]
    scale: float
    select_block_size: int
    causal: bool
    impl: str


def _check(call: Call | GradCall, mode: str) -> None:
    numbers = {"select_block_size": call.select_block_size}
    check_call(tensors_of(call), tuple(call.query_ends), tuple(call.key_ends), numbers, mode=mode)


def _canonical(call: Call | GradCall) -> Call | GradCall:
    """Rows of consecutive elements, and int32 ids side by side."""
    ids = call.topk_indices
    if settings().check_indices:
        refuse_bad_ids(ids, tuple(call.query_ends), tuple(call.key_ends), call.select_block_size)
    canonical: Call | GradCall = with_rows(call, but=("topk_indices",))
    return canonical._replace(topk_indices=as_int32("topk_indices", ids).contiguous())


def _specification(*arguments: Any) -> tuple[Tensor, ...]:
    out, softmax_max, softmax_sum = reference.forward(*arguments)
    return out, softmax_max.float(), softmax_sum.float()


def _results(call: Call, new: New) -> tuple[Tensor, ...]:
    rows = call.query.shape[:2]
    softmax_max, softmax_sum = (new(call.query, (*rows, STATE), dtype=torch.float32) for _ in range(2))
    return new(call.query, (*rows, call.value.shape[2])), softmax_max, softmax_sum


_REST = "SymInt[] query_ends, SymInt[] key_ends, float scale, int select_block_size, bool causal, str impl"
_RESULTS = "(Tensor, Tensor, Tensor)"

select_attention: Callable[..., tuple[Tensor, Tensor, Tensor]]
select_attention_grad: Callable[..., Gradients]
select_attention, select_attention_grad = register_ragged_attention(
    "select_attention",
    Direction(
        f"(Tensor query, Tensor key, Tensor value, Tensor topk_indices, {_REST}) -> {_RESULTS}",
        Call,
        check=_check,
        canonical=_canonical,
        specification=_specification,
        results=_results,
    ),
    Direction(
        "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor attention_out, Tensor softmax_max,"
        f" Tensor softmax_sum, Tensor topk_indices, {_REST}) -> {_RESULTS}",
        GradCall,
        check=_check,
        canonical=_canonical,
        specification=reference.backward,
        results=gradients_of,
    ),
    outputs=("attention_out", "softmax_max", "softmax_sum"),
)
