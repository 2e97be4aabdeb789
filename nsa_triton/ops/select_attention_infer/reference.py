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

Which page holds a token, and what a bad entry of the block table gives, paged_tokens.py says.

Everything is float32, or float64 for float64 tensors; the output is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_triton.ops._common.paged_tokens import cached_tokens, query_tokens


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
    for row, pages, visible in query_tokens(len(query), block_table, lengths, rows):
        place = selected_tokens(topk_indices[row], select_block_size, visible)
        if place.numel() == 0:
            continue
        selected = place >= 0
        keys, values = (
            cached_tokens(cache, pages, place.clamp(min=0)).masked_fill(~selected.unsqueeze(-1), 0.0).to(precision)
            for cache in (key, value)
        )
        output[row], lse[row] = attend(queries[row], keys, values, selected, scale)
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
