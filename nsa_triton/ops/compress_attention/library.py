"""The registered operators nsa_triton::compress_attention and nsa_triton::compress_attention_grad.

The gradient is that of the attention alone: which blocks are chosen has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.arguments import check_importance
from nsa_triton.ops._common.ragged_contract import STATISTICS
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
from nsa_triton.ops.compress_attention import reference
from nsa_triton.ops.compress_attention.contract import MASKS, NUMBERS, check_call


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


def _check(call: Call | GradCall, mode: str) -> None:
    if isinstance(call, Call):
        check_importance(call.importance)
    given = call._asdict()
    numbers = {name: int(given[name]) for name in NUMBERS if name in given}
    check_call(tensors_of(call), tuple(call.query_ends), tuple(call.key_ends), numbers, mode=mode)


def _canonical(call: Call | GradCall) -> Call | GradCall:
    """Rows of consecutive elements, statistics side by side, and masks of bytes."""
    canonical: Call | GradCall = with_rows(call, but=STATISTICS)
    tensors = tensors_of(canonical)
    changed: dict[str, Any] = {name: tensors[name].contiguous() for name in STATISTICS if name in tensors}
    changed |= {name: tensors[name].view(torch.uint8) for name in MASKS if name in tensors}
    return canonical._replace(**changed)


def _results(call: Call, new: New) -> tuple[Tensor, ...]:
    query, value = call.query, call.value
    ids = new(query, (query.shape[0], value.shape[1], call.select_block_count), dtype=torch.int32)
    largest, total = (new(query, (*query.shape[:2], STATE), dtype=torch.float32) for _ in range(2))
    return new(query, (*query.shape[:2], value.shape[2])), ids, largest, total


_TENSORS = "Tensor query, Tensor key, Tensor value"
_ENDS = "SymInt[] query_ends, SymInt[] key_ends"
_WINDOWS = "float scale, int compress_block_size, int compress_stride"

compress_attention: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
compress_attention_grad: Callable[..., Gradients]
compress_attention, compress_attention_grad = register_ragged_attention(
    "compress_attention",
    Direction(
        f"({_TENSORS}, Tensor? atten_mask, Tensor? topk_mask, {_ENDS}, {_WINDOWS}, int select_block_size,"
        " int select_block_count, bool causal, int num_init_blocks, int num_local_blocks, str importance, str impl)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        Call,
        check=_check,
        canonical=_canonical,
        specification=reference.forward,
        results=_results,
    ),
    Direction(
        f"(Tensor grad, {_TENSORS}, Tensor attention_out, Tensor softmax_max, Tensor softmax_sum, Tensor? atten_mask,"
        f" {_ENDS}, {_WINDOWS}, bool causal, str impl) -> (Tensor, Tensor, Tensor)",
        GradCall,
        check=_check,
        canonical=_canonical,
        specification=reference.backward,
        results=gradients_of,
    ),
    outputs=("attention_out", "topk_indices", "softmax_max", "softmax_sum"),
)
