"""The specification of select_attention_infer as readable PyTorch.

Query token t of batch b, the last of whose `tokens` query tokens is the newest of the cache, sees

    vis = lengths[b] - (tokens - 1 - t)

tokens of the cache. Of these, head h attends to the blocks that the list of its kv head n names:

    P      = all p of  id * l' .. min((id + 1) * l', vis) - 1,  for each id of topk_indices[t, n, :] in turn
    s[p]   = scale * query[t, h, :] . key[p, n, :]
    out[h] = sum over P of exp(s[p] - max s) * value[p, n, :]  /  sum over P of exp(s[p] - max s)
    lse[h] = log(sum over P of exp(s[p]))

An id that no block below vis has is skipped, wherever in the list it stands: -1, or garbage. An id that is listed twice
counts twice. Where nothing is selected the output is 0 and lse is -inf, and so it is in rows that are no query token.

Token p of batch b is in page block_table[b, p // page], row p % page. A page that is not in the cache is replaced by
the nearest one that is, and a page beyond the end of the block table by the last one in it: garbage gives wrong
numbers, never an access to memory that is not the caller's.

Everything is float32, or float64 for float64 tensors; the output is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    select_block_size: int,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [T, N1, Dv] and lse [T, N1] of query [T, N1, Dk], the caches [pages, page, N2, D] and ids [T, N2, K].

    `rows` is [B, 2], the first row and the number of query tokens of each batch; None stands for T / B tokens each.
    lse has the precision of the sums. `precision` replaces that of every step: with the dtype of the tensors, the
    result is what eager PyTorch makes of them.
    """
    precision = precision or torch.promote_types(query.dtype, torch.float32)
    queries = query.to(precision)
    output = queries.new_zeros((*query.shape[:2], value.shape[3]))
    lse = queries.new_full(query.shape[:2], -torch.inf)
    batches = block_table.shape[0]
    each = query.shape[0] // batches
    row_list = [(b * each, each) for b in range(batches)] if rows is None else rows.tolist()
    for table, length, (first, tokens) in zip(block_table.long(), lengths.tolist(), row_list, strict=True):
        for row in range(max(first, 0), min(first + tokens, len(query))):
            visible = length - (first + tokens - 1 - row)
            place = selected_tokens(topk_indices[row], select_block_size, visible)
            if place.numel() == 0:
                continue
            keys, values = (_gathered(cache, table, place).to(precision) for cache in (key, value))
            output[row], lse[row] = attend(queries[row], keys, values, place >= 0, scale)
    return output.to(query.dtype), lse


def selected_tokens(ids: Tensor, block: int, visible: int) -> Tensor:
    """The places [N2, P] in the sequence that the ids [N2, K] select; -1 stands for none."""
    ids = ids.long().unsqueeze(-1)  # [N2, K, 1]
    place = ids * block + torch.arange(block, device=ids.device)
    selected = (ids >= 0) & (ids * block < visible) & (place < visible)
    place = torch.where(selected, place, -1).flatten(1)
    return place[:, (place >= 0).any(0)]  # what no head selects costs no time


def attend(query: Tensor, keys: Tensor, values: Tensor, selected: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query [N1, Dk] over its own tokens [N2, P, D] of each kv head, those that are selected [N2, P]."""
    grouped = query.unflatten(0, (keys.shape[0], -1))  # type: ignore[no-untyped-call]  # [N2, G, Dk]
    scores = (grouped @ keys.mT * scale).masked_fill(~selected.unsqueeze(1), -torch.inf)  # [N2, G, P]
    nothing = ~selected.any(-1)[:, None, None]
    largest = scores.amax(-1, keepdim=True).masked_fill(nothing, 0.0)  # -inf minus itself is NaN
    terms = torch.exp(scores - largest)
    total = terms.sum(-1, keepdim=True)
    output = (terms @ values / total).masked_fill(nothing, 0.0)
    return output.flatten(0, 1), (largest + total.log()).flatten()


def _gathered(cache: Tensor, table: Tensor, place: Tensor) -> Tensor:
    """The tokens [N2, P, D] at the places [N2, P] of a batch, with zeros where there is none."""
    page = cache.shape[1]
    pages = table[(place.clamp(min=0) // page).clamp(max=len(table) - 1)].clamp(0, cache.shape[0] - 1)
    heads = torch.arange(cache.shape[2], device=cache.device).unsqueeze(-1)
    tokens = cache[pages, place.clamp(min=0) % page, heads]
    return tokens.masked_fill(place.unsqueeze(-1) < 0, 0.0)
