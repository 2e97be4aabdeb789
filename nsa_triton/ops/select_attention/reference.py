"""The specification of select_attention and its gradient as readable PyTorch.

Query token t of a segment, counted from the segment's first, attends to the blocks that the list of its kv head names.
For head h of kv head n:

    P      = all p of  id * l' .. min((id + 1) * l', keys) - 1,  for each id of topk_indices[t, n, :] in turn;
             with `causal` only those with  p <= t
    s[p]   = scale * query[t, h, :] . key[p, n, :]
    m      = max over P of s[p]
    z      = sum over P of exp(s[p] - m)
    w[p]   = exp(s[p] - m) / z
    out    = sum over P of w[p] * value[p, n, :],  w[p] rounded to the dtype of value

where p counts from the first of the segment's `keys` key tokens. An id that no block of the segment has is skipped,
wherever in the list it stands: -1, or garbage. An id that is listed twice counts twice. Where P is empty, and in rows
of `query` behind the last segment, out is 0, m is the lowest number of float32 and z is 0.

The gradient is that of `out`, made of the m, z and out that it is given:

    dw[p]  = grad[t, h, :] . value[p, n, :]
    ds[p]  = w[p] * (dw[p] - sum of grad[t, h, :] * out[t, h, :])

    query_grad[t, h, :] = scale * sum over P of ds[p] * key[p, n, :]
    key_grad[p, n, :]   = scale * sum over t and h with p in P of ds[p] * query[t, h, :]
    value_grad[p, n, :] = sum over t and h with p in P of w[p] * grad[t, h, :]

Everything else is float32, or float64 for float64 tensors; out and the gradients are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_triton.ops._common.statistics import LOWEST, STATE


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    query_ends: tuple[int, ...],
    key_ends: tuple[int, ...],
    scale: float,
    select_block_size: int,
    causal: bool,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T1, N1, Dv], m and z [T1, N1, 8] of query [T1, N1, Dk], key and value [T2, N2, D] and ids [T1, N2, K].

    m and z have the precision of the sums. `precision` replaces that of every step: with the dtype of the tensors, the
    result is what eager PyTorch makes of them.
    """
    precision = precision or torch.promote_types(query.dtype, torch.float32)
    queries, keys, values = (tensor.to(precision) for tensor in (query, key, value))
    out = queries.new_zeros((*query.shape[:2], value.shape[2]))
    total = queries.new_zeros(query.shape[:2], dtype=torch.promote_types(precision, torch.float32))
    largest = torch.full_like(total, LOWEST)
    for row, place in _rows(topk_indices, query_ends, key_ends, select_block_size, causal):
        scores = _scores(queries[row], _gathered(keys, place), place, scale)
        nothing = ~(place >= 0).any(-1)[:, None, None]
        best = scores.amax(-1, keepdim=True).masked_fill(nothing, 0.0)  # -inf minus itself is NaN
        terms = torch.exp(scores - best)
        sums = terms.sum(-1, keepdim=True)
        weights = (terms / sums).masked_fill(nothing, 0.0).to(value.dtype).to(precision)
        out[row] = (weights @ _gathered(values, place)).flatten(0, 1)
        largest[row] = best.to(largest.dtype).masked_fill(nothing, LOWEST).flatten()
        total[row] = sums.flatten()
    softmax_max, softmax_sum = (numbers.unsqueeze(-1).repeat(1, 1, STATE) for numbers in (largest, total))
    return out.to(query.dtype), softmax_max, softmax_sum


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    topk_indices: Tensor,
    query_ends: tuple[int, ...],
    key_ends: tuple[int, ...],
    scale: float,
    select_block_size: int,
    causal: bool,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value. `attention_out`, `softmax_max` and `softmax_sum` are taken as given."""
    precision = precision or torch.promote_types(query.dtype, torch.float32)
    grads, queries, keys, values = (tensor.to(precision) for tensor in (grad, query, key, value))
    query_grad, key_grad, value_grad = (torch.zeros_like(tensor) for tensor in (queries, keys, values))
    delta = (grads * attention_out.to(precision)).sum(-1)  # [T1, N1]
    heads = torch.arange(key.shape[1], device=key.device).unsqueeze(-1)
    for row, place in _rows(topk_indices, query_ends, key_ends, select_block_size, causal):
        q, g, m, z, d = (_grouped(part[row], heads) for part in (queries, grads, softmax_max, softmax_sum, delta))
        k, v = _gathered(keys, place), _gathered(values, place)
        weights = (torch.exp(_scores(queries[row], k, place, scale) - m[..., :1]) / z[..., :1]).to(precision)
        weights = weights.masked_fill(z[..., :1] == 0, 0.0)
        terms = weights * (g @ v.mT - d.unsqueeze(-1)) * scale  # [N2, G, P]
        query_grad[row] = (terms @ k).flatten(0, 1)
        chosen = (place.clamp(min=0), heads)  # what is not selected gets zeros
        key_grad.index_put_(chosen, terms.mT @ q, accumulate=True)
        value_grad.index_put_(chosen, weights.mT @ g, accumulate=True)
    return query_grad.to(query.dtype), key_grad.to(key.dtype), value_grad.to(value.dtype)


def _rows(
    topk_indices: Tensor, query_ends: tuple[int, ...], key_ends: tuple[int, ...], block: int, causal: bool
) -> list[tuple[int, Tensor]]:
    """Each row of query that attends to something, and the rows of key [N2, P] to which; -1 stands for none."""
    rows = []
    first_query = first_key = 0
    for query_end, key_end in zip(query_ends, key_ends, strict=True):
        for row in range(first_query, query_end):
            visible = key_end - first_key
            if causal:
                visible = min(visible, row - first_query + 1)
            place = _selected_tokens(topk_indices[row], block, visible)
            if place.numel():
                rows.append((row, torch.where(place < 0, -1, first_key + place)))
        first_query, first_key = query_end, key_end
    return rows


def _selected_tokens(ids: Tensor, block: int, visible: int) -> Tensor:
    """The tokens [N2, P] of a segment that the ids [N2, K] select of the first `visible`; -1 stands for none."""
    first = ids.long().unsqueeze(-1) * block  # [N2, K, 1]
    place = first + torch.arange(block, device=ids.device)
    place = torch.where((first >= 0) & (place < visible), place, -1).flatten(1)
    return place[:, (place >= 0).any(0)]  # what no head selects costs no time


def _gathered(tokens: Tensor, place: Tensor) -> Tensor:
    """The rows [N2, P, D] at the places [N2, P] of each head, with zeros where there is none."""
    heads = torch.arange(len(place), device=place.device).unsqueeze(-1)
    return tokens[place.clamp(min=0), heads].masked_fill(place.unsqueeze(-1) < 0, 0.0)


def _scores(query: Tensor, keys: Tensor, place: Tensor, scale: float) -> Tensor:
    """[N2, G, P] of one query token [N1, Dk] and its keys [N2, P, Dk]; -inf where there is none."""
    scores = _grouped(query, keys) @ keys.mT * scale
    return scores.masked_fill(place.unsqueeze(1) < 0, -torch.inf)


def _grouped(of_heads: Tensor, kv_heads: Tensor) -> Tensor:
    """[N1, ...] as [N2, G, ...], where `kv_heads` is [N2, ...]."""
    return of_heads.view(len(kv_heads), -1, *of_heads.shape[1:])
