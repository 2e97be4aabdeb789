"""Paged caches: their two layouts, and which pages a batch owns."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentValueError
from nsa_triton.ops._common.indices import refuse_outside


def pages_of(lengths: Tensor, page: int) -> Tensor:
    """How many pages hold that many tokens each."""
    return (lengths + page - 1) // page


def dealt_pages(lengths: Tensor, n_pages: int, page: int) -> Tensor:
    """The block table [B, n_pages // B] of a call without one: pages are dealt to the batches in order.

    Every batch gets as many pages as the longest needs, batch b those from b * ceil(max(lengths) / page) on. Computed
    on the device of `lengths`, which is not read back.
    """
    batch = lengths.shape[0]
    if n_pages < batch:
        expected = f"at least {batch} pages, one per batch, in a call without block_table"
        raise ArgumentValueError("key.shape[0]", expected, n_pages, "Pass block_table")
    each = pages_of(lengths, page).max()
    first = torch.arange(batch, dtype=torch.int32, device=lengths.device)[:, None] * each
    within = torch.arange(n_pages // batch, dtype=torch.int32, device=lengths.device)
    return (first + within).to(torch.int32)


def check_dense(argument: str, cache: Tensor) -> None:
    """Kernels load rows of consecutive elements, and a cache is too large to be copied for that."""
    if cache.stride(-1) != 1 and cache.shape[-1] > 1:
        hint = "The other dimensions may have any strides. Call .contiguous() where the cache is made"
        expected = "1: the features of a token side by side, which is how kernels load and store them"
        raise ArgumentValueError(f"{argument}.stride(-1)", expected, cache.stride(-1), hint)


def check_capacity(lengths: tuple[int, ...], argument: str, page: int, n_pages: int, columns: int | None) -> None:
    """Refuse lengths, known on the host, that the pages do not hold: those in the `columns` of the block table, or, if
    it is None, those that are dealt."""
    longest = max(lengths)
    if columns is None:
        needed = len(lengths) * max(1, -(-longest // page))
        if needed > n_pages:
            expected = f"at least {needed} pages, for {len(lengths)} batches of up to {longest} tokens"
            raise ArgumentValueError("key.shape[0]", expected, n_pages, "Or pass block_table")
    elif longest > columns * page:
        expected = f"at most {columns * page} tokens, {columns} pages of block_table"
        raise ArgumentValueError(argument, expected, f"{longest} at index {lengths.index(longest)}")


def refuse_missing_pages(
    argument: str, lengths: Tensor, block_table: Tensor, page: int, read: Tensor | None = None
) -> None:
    """Raise where a batch is longer than its row of the block table has pages. Reads tensors back to the host.

    `read` [B] says which batches matter; None: all.
    """
    capacity = block_table.shape[1] * page
    hint = f"block_table has {block_table.shape[1]} pages of {page} tokens per batch"
    read = torch.ones_like(lengths, dtype=torch.bool) if read is None else read
    refuse_outside(argument, lengths, 0, capacity + 1, read, hint)


def refuse_bad_pages(block_table: Tensor, n_pages: int, read: Tensor) -> None:
    """Raise at the first page id that is read, as `read` [B, max_blocks] says, and is not in the cache."""
    refuse_outside("block_table", block_table, 0, n_pages, read, f"The cache has {n_pages} pages")
