"""Query tokens on paged caches, and the cached tokens: what the references of attention over pages share.

Query token t of batch b, the last of whose `tokens` query tokens is the newest of the cache, sees

    vis = lengths[b] - (tokens - 1 - t)

tokens of the cache. Token p of batch b is in page block_table[b, p // page], row p % page. A page that is not in the
cache is replaced by the nearest one that is, and a page beyond the end of the block table by the last one in it:
garbage gives wrong numbers, never an access to memory that is not the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def query_tokens(
    total: int, block_table: Tensor, lengths: Tensor, rows: Tensor | None
) -> list[tuple[int, Tensor, int]]:
    """Of each query token its row, of `total`, the pages of its batch, and vis.

    `rows` is [B, 2], the first row and the number of query tokens of each batch; None stands for total / B tokens each.
    """
    batches = block_table.shape[0]
    each = total // batches
    row_list = [(b * each, each) for b in range(batches)] if rows is None else rows.tolist()
    return [
        (row, pages, length - (first + tokens - 1 - row))
        for pages, length, (first, tokens) in zip(block_table.long(), lengths.tolist(), row_list, strict=True)
        for row in range(max(first, 0), min(first + tokens, total))
    ]


def cached_tokens(cache: Tensor, pages: Tensor, places: Tensor) -> Tensor:
    """The tokens [N2, P, D] of a batch with these pages at `places`: [P], or [N2, P] where heads have their own."""
    page = cache.shape[1]
    page_ids = pages[(places // page).clamp(max=len(pages) - 1)].clamp(0, cache.shape[0] - 1)
    heads = torch.arange(cache.shape[2], device=cache.device).unsqueeze(-1)
    return cache[page_ids, places % page, heads]
