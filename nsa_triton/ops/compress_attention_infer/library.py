"""The registered operator nsa_triton::compress_attention_infer.

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
from nsa_triton.ops.compress_attention_infer import reference
from nsa_triton.ops.compress_attention_infer.contract import check_call, check_importance, refuse_bad_indices
from nsa_triton.settings import settings

OutputAndIds = tuple[Tensor, Tensor]


def _compress_attention_infer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    raw_lengths: Tensor | None,
    scale: float,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    select_block_count: int,
    importance: str,
    impl: str,
) -> OutputAndIds:
    sizes = (compress_block_size, compress_stride, select_block_size, select_block_count)
    _check((query, key, value, block_table, lengths, rows, raw_lengths), sizes, importance, "structural")
    if query.shape[0] == 0:
        return _outputs(query, value, select_block_count)
    if settings().check_indices:
        refuse_bad_indices(query, key, block_table, lengths, rows, raw_lengths, compress_block_size, compress_stride)
    # Kernels want dense indices and rows of consecutive elements. These tensors are small; a cache is never copied.
    query = query if query.stride(-1) == 1 else query.contiguous()
    indices = [None if given is None else given.contiguous() for given in (block_table, lengths, rows, raw_lengths)]
    arguments = (query, key, value, *indices, scale, *sizes, importance)
    return run(
        impl,
        query.dtype,
        kernels=lambda: launcher("compress_attention_infer").forward(*arguments),
        reference=lambda: reference.forward(*arguments),  # type: ignore[arg-type]
    )


def _compress_attention_infer_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    raw_lengths: Tensor | None,
    scale: float,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    select_block_count: int,
    importance: str,
    impl: str,
) -> OutputAndIds:
    sizes = (compress_block_size, compress_stride, select_block_size, select_block_count)
    _check((query, key, value, block_table, lengths, rows, raw_lengths), sizes, importance, mode_in_force())
    return _outputs(query, value, select_block_count)


def _check(tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], importance: str, mode: str) -> None:
    names = ("query", "key", "value", "block_table", "lengths", "rows", "raw_lengths")
    size_names = ("compress_block_size", "compress_stride", "select_block_size", "select_block_count")
    check_importance(importance)
    check_call(dict(zip(names, tensors, strict=True)), dict(zip(size_names, sizes, strict=True)), mode=mode)


def _outputs(query: Tensor, value: Tensor, count: int) -> OutputAndIds:
    tokens, heads, _ = query.shape
    ids = query.new_empty((tokens, value.shape[2], count), dtype=torch.int32)
    return query.new_empty((tokens, heads, value.shape[3])), ids


compress_attention_infer: Callable[..., OutputAndIds] = register(
    "compress_attention_infer",
    "(Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor lengths, Tensor? rows, Tensor? raw_lengths,"
    " float scale, int compress_block_size, int compress_stride, int select_block_size, int select_block_count,"
    " str importance, str impl) -> (Tensor, Tensor)",
    _compress_attention_infer,
    _compress_attention_infer_fake,
)
