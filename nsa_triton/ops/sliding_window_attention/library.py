"""The registered operators nsa_triton::sliding_window_attention and nsa_triton::sliding_window_attention_grad."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.ragged_operator import (
    Direction,
    Gradients,
    New,
    gradients_of,
    register_ragged_attention,
    tensors_of,
    with_rows,
)
from nsa_triton.ops.sliding_window_attention import reference
from nsa_triton.ops.sliding_window_attention.contract import check_call


class Call(NamedTuple):
    """The arguments of the operator."""

    query: Tensor  # [T1, N1, Dk]
    key: Tensor  # [T2, N2, Dk]
    value: Tensor  # [T2, N2, Dv]
    query_ends: list[int]
    key_ends: list[int]
    scale: float
    window_size: int
    impl: str


class GradCall(NamedTuple):
    """The arguments of the gradient."""

    grad: Tensor  # [T1, N1, Dv]
    query: Tensor
    key: Tensor
    value: Tensor
    attention_out: Tensor  # [T1, N1, Dv]
    lse: Tensor  # [T1, N1] float32
    query_ends: list[int]
    key_ends: list[int]
    scale: float
    window_size: int
    impl: str


def _check(call: Call | GradCall, mode: str) -> None:
    numbers = {"window_size": call.window_size}
    check_call(tensors_of(call), tuple(call.query_ends), tuple(call.key_ends), numbers, mode=mode)


def _specification(*arguments: Any) -> tuple[Tensor, ...]:
    out, lse = reference.forward(*arguments)
    return out, lse.float().t().contiguous().t()


def _results(call: Call, new: New) -> tuple[Tensor, ...]:
    """The log-sum-exp lies head after head, as kernels write and read it."""
    tokens, heads, _ = call.query.shape
    lse = new(call.query, (heads, tokens), dtype=torch.float32).t()
    return new(call.query, (tokens, heads, call.value.shape[2])), lse


_REST = "SymInt[] query_ends, SymInt[] key_ends, float scale, int window_size, str impl"

sliding_window_attention: Callable[..., tuple[Tensor, Tensor]]
sliding_window_attention_grad: Callable[..., Gradients]
sliding_window_attention, sliding_window_attention_grad = register_ragged_attention(
    "sliding_window_attention",
    Direction(
        f"(Tensor query, Tensor key, Tensor value, {_REST}) -> (Tensor, Tensor)",
        Call,
        check=_check,
        canonical=with_rows,
        specification=_specification,
        results=_results,
    ),
    Direction(
        "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor attention_out, Tensor lse,"
        f" {_REST}) -> (Tensor, Tensor, Tensor)",
        GradCall,
        check=_check,
        canonical=functools.partial(with_rows, but=("lse",)),  # its heads lie apart
        specification=reference.backward,
        results=gradients_of,
    ),
    outputs=("attention_out", "lse"),
)
