"""The registered operator nsa_triton::compress_attention_infer.

It sees one layout, packed queries and caches with their heads apart, and checks shapes itself: torch.ops and graphs
made by torch.compile do not come through the checks of api.py. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.arguments import check_importance
from nsa_triton.ops._common.dense import with_dense_rows
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import register
from nsa_triton.ops.compress_attention_infer import reference
from nsa_triton.ops.compress_attention_infer.contract import check_call, check_forced, refuse_bad_indices
from nsa_triton.settings import settings

OutputAndIds = tuple[Tensor, Tensor]
SIZES = ("compress_block_size", "compress_stride", "select_block_size", "select_block_count")


class Call(NamedTuple):
    """The arguments of the operator."""

    query: Tensor  # [T, N1, Dk]
    key: Tensor  # [pages, page, N2, Dk]
    value: Tensor  # [pages, page, N2, Dv]
    block_table: Tensor  # [B, max_blocks]
    lengths: Tensor  # [B] compressed tokens
    rows: Tensor | None  # [B, 2] first row and query tokens; None: T / B tokens each
    raw_lengths: Tensor | None  # [B], where early query tokens see less
    scale: float
    compress_block_size: int
    compress_stride: int
    select_block_size: int
    select_block_count: int
    importance: str
    impl: str
    num_init_blocks: int | None = None  # both None: those of CANN
    num_local_blocks: int | None = None


def _compress_attention_infer(*arguments: Any) -> OutputAndIds:
    call = Call(*arguments)
    _check(call, "structural")
    if call.query.shape[0] == 0:
        return _outputs(call)
    if settings().check_indices:
        refuse_bad_indices(call.query, call.key, *call[3:7], call.compress_block_size, call.compress_stride)
    # Kernels want dense indices and rows of consecutive elements. These tensors are small; a cache is never copied.
    query = with_dense_rows(call.query)
    indices = [None if given is None else given.contiguous() for given in call[3:7]]
    forced = (call.num_init_blocks, call.num_local_blocks)
    dense: tuple[Any, ...] = (query, call.key, call.value, *indices, *call[7:13], *forced)
    return run(
        call.impl,
        query.dtype,
        kernels=lambda: launcher("compress_attention_infer").forward(*dense),
        reference=lambda: reference.forward(*dense),
        argument="query",
    )


def _compress_attention_infer_fake(*arguments: Any) -> OutputAndIds:
    call = Call(*arguments)
    _check(call, mode_in_force())
    return _outputs(call)


def _check(call: Call, mode: str) -> None:
    check_importance(call.importance)
    check_forced(call.num_init_blocks, call.num_local_blocks, call.raw_lengths)
    given = call._asdict()
    check_call({name: given[name] for name in Call._fields[:7]}, {name: given[name] for name in SIZES}, mode=mode)


def _outputs(call: Call) -> OutputAndIds:
    query, value = call.query, call.value
    ids = query.new_empty((query.shape[0], value.shape[2], call.select_block_count), dtype=torch.int32)
    return query.new_empty((*query.shape[:2], value.shape[3])), ids


compress_attention_infer: Callable[..., OutputAndIds] = register(
    "compress_attention_infer",
    "(Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor lengths, Tensor? rows, Tensor? raw_lengths,"
    " float scale, int compress_block_size, int compress_stride, int select_block_size, int select_block_count,"
    " str importance, str impl, int? num_init_blocks=None, int? num_local_blocks=None) -> (Tensor, Tensor)",
    _compress_attention_infer,
    _compress_attention_infer_fake,
)
