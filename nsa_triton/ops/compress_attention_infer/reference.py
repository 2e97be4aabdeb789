"""The specification of compress_attention_infer as readable PyTorch.

Query token t of batch b, the first row and number of whose query tokens are rows[b], attends to the compressed tokens
i = 0 .. n - 1 of its batch, n = lengths[b]. For head h, whose kv head is h // G:

    s[i]   = scale * query[t, h, :] . key[i, h // G, :]
    P[i]   = exp(s[i] - max s) / sum over i of exp(s[i] - max s)
    out[h] = sum over i of P[i] * value[i, h // G, :]                  with P rounded to the dtype of value

Where raw_lengths is given, the query tokens are the last of raw_lengths[b] raw tokens, and the last compressed token is
hidden from those that come before the end of its window. Where everything is hidden, P and the output are 0.

Block j of a head has the importance imp[h, j] that block_scores.py gives P[h, :]. A kv head adds up its group:

    score[n, j] = sum over the heads h of kv head n of  imp[h, j]

The candidates are the nb blocks that the windows touch; the ids of kv head n are

    0, nb - 2, nb - 1, then the other blocks by descending score[n, :], equal ones by ascending number, then -1

cut after select_block_count. NaN counts as a score of 0. With num_init_blocks or num_local_blocks the candidates of a
query token, at position p of its batch, are the blocks 0 .. own = p // l' instead, and so many of the first and of the
last of them come first, where other candidates have a score of 0 if no window is on them.

Token i of batch b is in page block_table[b, i // page], row i % page. A page that is not in the cache is replaced by
the nearest one that is, and what lies beyond the block table does not exist. Rows that are no query token have output 0
and ids -1. Everything is float32, or float64 for float64 tensors; the output is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_triton.ops._common import block_scores


def forward(
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
    num_init_blocks: int | None = None,
    num_local_blocks: int | None = None,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [T, N1, Dv] and ids [T, N2, K] of query [T, N1, Dk] and the caches [pages, page, N2, D].

    `rows` is [B, 2]; None stands for T / B query tokens each. `precision` replaces that of every step: with the dtype
    of the tensors, the result is what eager PyTorch makes of them.
    """
    geometry = (compress_block_size, compress_stride, select_block_size)
    tensors = (query, key, value, block_table, lengths, rows, raw_lengths)
    output = query.new_zeros((*query.shape[:2], value.shape[3]))
    ids = block_table.new_full((query.shape[0], key.shape[2], select_block_count), -1, dtype=torch.int32)
    as_cann = num_init_blocks is None and num_local_blocks is None
    for mine, attended, scored, position in _batches(*tensors, scale, *geometry, importance, precision):
        output[mine] = attended.to(query.dtype)
        if as_cann or position is None:
            ids[mine] = best_blocks(scored, select_block_count)
        else:
            own = position // select_block_size
            ids[mine] = best_blocks_up_to(own, scored, select_block_count, num_init_blocks or 0, num_local_blocks or 0)
    return output, ids


def scores(
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
    importance: str,
) -> list[Tensor]:
    """The scores [tokens, N2, nb] of each batch, no block forced: what the ids of `forward` are chosen by."""
    geometry = (compress_block_size, compress_stride, select_block_size)
    tensors = (query, key, value, block_table, lengths, rows, raw_lengths)
    return [scored for _, _, scored, _ in _batches(*tensors, scale, *geometry, importance, None)]


def _batches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    raw_lengths: Tensor | None,
    scale: float,
    block: int,
    stride: int,
    select: int,
    importance: str,
    precision: torch.dtype | None,
) -> list[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Of each batch: its rows of the packed queries, their output [tokens, N1, Dv], scores [tokens, N2, nb] and, if
    known, positions [tokens] in the batch."""
    found = []
    precision = precision or torch.promote_types(query.dtype, torch.float32)
    batches, page = block_table.shape[0], key.shape[1]
    each = query.shape[0] // batches
    owned = [(b * each, each) for b in range(batches)] if rows is None else rows.tolist()
    raw = None if raw_lengths is None else raw_lengths.tolist()
    for b, length in enumerate(lengths.tolist()):
        n = min(max(length, 0), block_table.shape[1] * page)
        pages = block_table[b, : -(-n // page)].long().clamp(0, key.shape[0] - 1)
        keys, values = (cache[pages].flatten(0, 1)[:n].to(precision) for cache in (key, value))  # [n, N2, D]
        first, tokens = owned[b]
        mine = range(query.shape[0])[max(first, 0) : max(first + tokens, 0)]
        newer = first + tokens - 1 - torch.arange(mine.start, mine.stop, device=query.device)
        hidden, position = torch.zeros_like(newer, dtype=torch.bool), None
        if raw is not None:
            position = raw[b] - 1 - newer
            hidden = newer > raw[b] - ((n - 1) * stride + block)  # more than the raw tokens behind the last window
        weights = probabilities(query[mine.start : mine.stop].to(precision), keys, scale, hidden)
        output = torch.einsum("thgn,nhd->thgd", weights.to(value.dtype).to(precision), values)
        blocks = candidates(n, block, stride, select)
        imp = block_scores.block_importance(weights, blocks, select // stride, block // stride, importance)
        found.append((slice(mine.start, mine.stop), output.flatten(1, 2), imp.sum(2), position))
    return found


def candidates(n: int, block: int, stride: int, select: int) -> int:
    """nb, the number of selection blocks that the windows of n compressed tokens touch."""
    return -(-((n - 1) * stride + block) // select) if n else 0


def probabilities(query: Tensor, keys: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """P [tokens, N2, G, n] of queries [tokens, N1, Dk] and keys [n, N2, Dk].

    `hidden` says from which of the query tokens the last key is hidden.
    """
    grouped = query.unflatten(1, (keys.shape[1], -1))  # type: ignore[no-untyped-call]
    s = torch.einsum("thgd,nhd->thgn", grouped, keys) * scale
    if s.shape[-1] == 0:
        return s
    s[..., -1] = s[..., -1].masked_fill(hidden[:, None, None], -torch.inf)
    largest = s.amax(-1, keepdim=True)
    terms = torch.exp(s - largest.masked_fill(largest == -torch.inf, 0.0))  # -inf minus itself is NaN
    total = terms.sum(-1, keepdim=True)
    return terms / total.masked_fill(total == 0, 1.0)


def best_blocks(scores: Tensor, count: int) -> Tensor:
    """The ids [..., count] of scores [..., nb]: forced blocks, then the best, then -1."""
    blocks = scores.shape[-1]
    numbers = torch.arange(blocks, device=scores.device)
    return block_scores.best_blocks(scores, (numbers == 0) | (numbers >= blocks - 2), count)


def best_blocks_up_to(own: Tensor, scores: Tensor, count: int, init: int, local: int) -> Tensor:
    """The ids [tokens, N2, count] among the blocks 0 .. own[t], with scores [tokens, N2, nb], 0 behind them: the first
    `init` and the last `local`, then the best, then -1."""
    missing = max(0, int(own.max()) + 1 - scores.shape[-1]) if len(own) else 0
    scores = torch.nn.functional.pad(scores, (0, missing))
    numbers, last = torch.arange(scores.shape[-1], device=scores.device), own[:, None, None]
    forced = (numbers < init) | (numbers > last - local)
    # The blocks behind the last are the worst of all, and then none.
    allowed = (numbers <= last).expand(scores.shape)
    ids = block_scores.best_blocks(scores.nan_to_num(0.0).masked_fill(~allowed, -1.0), forced & allowed, count)
    return ids.masked_fill(ids > last, -1)
