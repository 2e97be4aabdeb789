"""The registered operator nsa_triton::select_attention_infer.

It sees one layout, packed queries and caches with their heads apart, and checks shapes itself: torch.ops and graphs
made by torch.compile do not come through the checks of api.py. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import register
from nsa_triton.ops.select_attention_infer import reference
from nsa_triton.ops.select_attention_infer.contract import check_call, refuse_bad_indices
from nsa_triton.settings import settings

OutputAndLse = tuple[Tensor, Tensor]


def _select_attention_infer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    select_block_size: int,
    impl: str,
) -> OutputAndLse:
    check_call(_named(query, key, value, topk_indices, block_table, lengths, rows), select_block_size)
    if query.shape[0] == 0:
        return _outputs(query, value)
    if settings().check_indices:
        refuse_bad_indices(key, topk_indices, block_table, lengths, rows, select_block_size)
    # Kernels want dense indices and rows of consecutive elements. These tensors are small; a cache is never copied.
    query = query if query.stride(-1) == 1 else query.contiguous()
    indices = (topk_indices.contiguous(), block_table.contiguous(), lengths.contiguous())
    arguments = (query, key, value, *indices, None if rows is None else rows.contiguous(), scale, select_block_size)

    def specification() -> OutputAndLse:
        output, lse = reference.forward(*arguments)
        return output, lse.float()

    return run(
        impl,
        query.dtype,
        kernels=lambda: launcher("select_attention_infer").forward(*arguments),
        reference=specification,
    )


def _select_attention_infer_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    select_block_size: int,
    impl: str,
) -> OutputAndLse:
    tensors = _named(query, key, value, topk_indices, block_table, lengths, rows)
    check_call(tensors, select_block_size, mode=mode_in_force())
    return _outputs(query, value)


def _named(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
) -> dict[str, Tensor | None]:
    return {
        "query": query,
        "key": key,
        "value": value,
        "topk_indices": topk_indices,
        "block_table": block_table,
        "lengths": lengths,
        "rows": rows,
    }


def _outputs(query: Tensor, value: Tensor) -> OutputAndLse:
    tokens, heads, _ = query.shape
    return query.new_empty((tokens, heads, value.shape[3])), query.new_empty((tokens, heads), dtype=torch.float32)


select_attention_infer: Callable[..., OutputAndLse] = register(
    "select_attention_infer",
    "(Tensor query, Tensor key, Tensor value, Tensor topk_indices, Tensor block_table, Tensor lengths, Tensor? rows,"
    " float scale, int select_block_size, str impl) -> (Tensor, Tensor)",
    _select_attention_infer,
    _select_attention_infer_fake,
)
