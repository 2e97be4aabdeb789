"""The registered operator nsa_triton::sliding_window_attention_infer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nsa_triton.ops._common.paged_operator import register_paged_attention
from nsa_triton.ops.sliding_window_attention_infer import reference
from nsa_triton.ops.sliding_window_attention_infer.contract import check_call, refuse_bad_indices


class Call(NamedTuple):
    """The arguments of the operator."""

    query: Tensor  # [T, N1, Dk]
    key: Tensor  # [pages, page, N2, Dk]
    value: Tensor  # [pages, page, N2, Dv]
    block_table: Tensor  # [B, max_blocks]
    lengths: Tensor  # [B] tokens
    rows: Tensor | None  # [B, 2] first row and query tokens; None: T / B tokens each
    scale: float
    window_size: int
    impl: str


def _refuse_bad_indices(call: Call) -> None:
    refuse_bad_indices(call.query, call.key, call.block_table, call.lengths, call.rows, call.window_size)


sliding_window_attention_infer = register_paged_attention(
    "sliding_window_attention_infer",
    "(Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor lengths, Tensor? rows, float scale,"
    " int window_size, str impl) -> (Tensor, Tensor)",
    Call,
    check_call=check_call,
    refuse_bad_indices=_refuse_bad_indices,
    reference=reference.forward,
)
