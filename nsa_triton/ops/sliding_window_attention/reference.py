"""The specification of sliding_window_attention and its gradient as readable PyTorch.

Segment b has the query tokens t = 0 .. S1 - 1 and the keys j = 0 .. S2 - 1, counted within the segment; query_ends and
key_ends say where it ends. The last query token stands at the last key: t stands at p = t + S2 - S1 and sees

    p - window_size < j <= p

For head h, whose kv head is n = h // G, over the keys j that t sees:

    s[t, j]   = scale * query[t, h, :] . key[j, n, :]
    lse[t, h] = log of the sum over j of exp(s[t, j])
    P[t, j]   = exp(s[t, j] - lse[t, h])
    out[t, h] = sum over j of P[t, j] * value[j, n, :]       with P rounded to the dtype of value

Where a query token sees nothing, and in rows of `query` behind the last segment, out is 0 and lse is -inf.

The gradient is that of out, made of the lse and out that it is given:

    value_grad[j, n, :] = sum over t and h of  P[t, j] * grad[t, h, :]
    dS[t, j]            = P[t, j] * (grad[t, h, :] . value[j, n, :]  -  grad[t, h, :] . out[t, h, :])
    query_grad[t, h, :] = scale * sum over j of  dS[t, j] * key[j, n, :]
    key_grad[j, n, :]   = scale * sum over t and h of  dS[t, j] * query[t, h, :]

Everything else is float32, or float64 for float64 tensors; out and the gradients are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

Ends = tuple[int, ...]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Ends,
    key_ends: Ends,
    scale: float,
    window_size: int,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """out [T1, N1, Dv] and lse [T1, N1] of query [T1, N1, Dk], key [T2, N2, Dk] and value [T2, N2, Dv].

    lse has the precision of the sums. `precision` replaces that of every step: with the dtype of the tensors, the
    result is what eager PyTorch makes of them.
    """
    precision = precision or torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros((*query.shape[:2], value.shape[2]))
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.promote_types(precision, torch.float32))
    for queries, keys in segments(query_ends, key_ends):
        q, k, v = (tensor.to(precision) for tensor in (query[queries], key[keys], value[keys]))
        s = scores(in_groups(q, k), k, scale).masked_fill(~visible(q, k, window_size)[:, None, None], -torch.inf)
        sums = torch.logsumexp(s, -1, keepdim=True)
        weights = torch.exp(s - sums.masked_fill(sums == -torch.inf, 0.0))  # -inf minus itself is NaN
        lse[queries] = sums.flatten(1).to(lse.dtype)
        found = torch.einsum("tngj,jnd->tngd", weights.to(value.dtype).to(precision), v)
        out[queries] = found.flatten(1, 2).to(out.dtype)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    lse: Tensor,
    query_ends: Ends,
    key_ends: Ends,
    scale: float,
    window_size: int,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, with their shapes and dtypes. `attention_out` and `lse` are taken as
    given."""
    precision = precision or torch.promote_types(query.dtype, torch.float32)
    query_grad, key_grad, value_grad = (torch.zeros_like(tensor) for tensor in (query, key, value))
    for queries, keys in segments(query_ends, key_ends):
        k, v = key[keys].to(precision), value[keys].to(precision)
        q, out, g = (in_groups(tensor[queries].to(precision), k) for tensor in (query, attention_out, grad))
        hidden = ~visible(q, k, window_size)[:, None, None]
        terms = in_groups(lse[queries].unsqueeze(-1), k)
        p = torch.exp(scores(q, k, scale) - terms).masked_fill(hidden, 0.0).to(precision)
        delta = (g * out).sum(-1, keepdim=True)
        ds = p * (torch.einsum("tngd,jnd->tngj", g, v) - delta)
        query_grad[queries] = (torch.einsum("tngj,jnd->tngd", ds, k) * scale).flatten(1, 2).to(query.dtype)
        key_grad[keys] = (torch.einsum("tngj,tngd->jnd", ds, q) * scale).to(key.dtype)
        value_grad[keys] = torch.einsum("tngj,tngd->jnd", p, g).to(value.dtype)
    return query_grad, key_grad, value_grad


def segments(query_ends: Ends, key_ends: Ends) -> list[tuple[slice, slice]]:
    """Where the queries and the keys of each segment are."""
    queries, keys = (
        [slice(begin, end) for begin, end in zip((0, *ends[:-1]), ends, strict=True)] for ends in (query_ends, key_ends)
    )
    return list(zip(queries, keys, strict=True))


def in_groups(tensor: Tensor, key: Tensor) -> Tensor:
    """[S1, N1, D] as [S1, N2, G, D]."""
    kv_heads = key.shape[1]
    return tensor.reshape(tensor.shape[0], kv_heads, tensor.shape[1] // kv_heads, tensor.shape[2])


def scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """s [S1, N2, G, S2] of query [S1, N2, G, D] and key [S2, N2, D]."""
    return torch.einsum("tngd,jnd->tngj", query, key) * scale


def visible(query: Tensor, key: Tensor, window_size: int) -> Tensor:
    """[S1, S2], true where t sees j."""
    token, place = (torch.arange(len(tensor), device=tensor.device) for tensor in (query, key))
    position = (token + len(key) - len(query)).unsqueeze(1)
    return (position - window_size < place) & (place <= position)
