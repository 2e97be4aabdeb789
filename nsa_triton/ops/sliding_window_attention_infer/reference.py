"""The specification of sliding_window_attention_infer as readable PyTorch.

Query token t of batch b, the last of whose `tokens` query tokens is the newest of the cache, sees

    vis = lengths[b] - (tokens - 1 - t)

tokens of the cache, and head h attends to the newest `window` of these, with its kv head n:

    P      = all p of  max(vis - window, 0) .. vis - 1
    s[p]   = scale * query[t, h, :] . key[p, n, :]
    out[h] = sum over P of exp(s[p] - max s) * value[p, n, :]  /  sum over P of exp(s[p] - max s)
    lse[h] = log(sum over P of exp(s[p]))

Where it sees nothing the output is 0 and lse is -inf, and so it is in rows that are no query token.

Which page holds a token, and what a bad entry of the block table gives, paged_tokens.py says. Pages that no window
touches are not looked at.

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
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    window: int,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [T, N1, Dv] and lse [T, N1] of query [T, N1, Dk] and the caches [pages, page, N2, D].

    `rows` is [B, 2], the first row and the number of query tokens of each batch; None stands for T / B tokens each.
    lse has the precision of the sums. `precision` replaces that of every step: with the dtype of the tensors, the
    result is what eager PyTorch makes of them.
    """
    precision = precision or torch.promote_types(query.dtype, torch.float32)
    queries = query.to(precision)
    output = queries.new_zeros((*query.shape[:2], value.shape[3]))
    lse = queries.new_full(query.shape[:2], -torch.inf)
    for row, pages, visible in query_tokens(len(query), block_table, lengths, rows):
        if visible < 1:
            continue
        place = torch.arange(max(visible - window, 0), visible, device=query.device)
        keys, values = (cached_tokens(cache, pages, place).to(precision) for cache in (key, value))
        output[row], lse[row] = attend(queries[row], keys, values, scale)
    return output.to(query.dtype), lse


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query [N1, Dk] over the tokens [N2, P, D] of each kv head."""
    grouped = query.unflatten(0, (keys.shape[0], -1))  # type: ignore[no-untyped-call]  # [N2, G, Dk]
    scores = grouped @ keys.mT * scale  # [N2, G, P]
    output = torch.softmax(scores, -1) @ values
    return output.flatten(0, 1), scores.logsumexp(-1).flatten()
