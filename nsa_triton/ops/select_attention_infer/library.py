"""The registered operator nsa_triton::select_attention_infer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nsa_triton.ops._common.paged_operator import register_paged_attention
from nsa_triton.ops.select_attention_infer import reference
from nsa_triton.ops.select_attention_infer.contract import check_call, refuse_bad_indices


class Call(NamedTuple):
    """The arguments of the operator."""

    query: Tensor  # [T, N1, Dk]
    key: Tensor  # [pages, page, N2, Dk]
    value: Tensor  # [pages, page, N2, Dv]
    topk_indices: Tensor  # [T, N2, K]
    block_table: Tensor  # [B, max_blocks]
    lengths: Tensor  # [B] tokens
    rows: Tensor | None  # [B, 2] first row and query tokens; None: T / B tokens each
    scale: float
    select_block_size: int
    impl: str


def _refuse_bad_indices(call: Call) -> None:
    refuse_bad_indices(call.key, call.topk_indices, call.block_table, call.lengths, call.rows, call.select_block_size)


select_attention_infer = register_paged_attention(
    "select_attention_infer",
    "(Tensor query, Tensor key, Tensor value, Tensor topk_indices, Tensor block_table, Tensor lengths, Tensor? rows,"
    " float scale, int select_block_size, str impl) -> (Tensor, Tensor)",
    Call,
    check_call=check_call,
    refuse_bad_indices=_refuse_bad_indices,
    reference=reference.forward,
)
