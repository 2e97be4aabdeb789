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


def refuse_missing_pages(argument: str, lengths: Tensor, block_table: Tensor, page: int) -> None:
    """Raise where a batch is longer than its row of the block table has pages. Reads tensors back to the host."""
    capacity = block_table.shape[1] * page
    hint = f"block_table has {block_table.shape[1]} pages of {page} tokens per batch"
    refuse_outside(argument, lengths, 0, capacity + 1, torch.ones_like(lengths, dtype=torch.bool), hint)


def refuse_bad_pages(block_table: Tensor, n_pages: int, read: Tensor) -> None:
    """Raise at the first page id that is read, as `read` [B, max_blocks] says, and is not in the cache."""
    refuse_outside("block_table", block_table, 0, n_pages, read, f"The cache has {n_pages} pages")
