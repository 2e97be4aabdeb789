"""The specification of compress_attention and its gradient as readable PyTorch.

Segment b has the query tokens t = 0 .. S1 - 1 and the compressed tokens i = 0 .. S2 - 1, counted within the segment;
query_ends and key_ends say where it ends. For head h, whose kv head is n = h // G:

    s[t, i] = scale * query[t, h, :] . key[i, n, :]        over the compressed tokens i that t sees
    m[t]    = max over i of s[t, i]
    z[t]    = sum over i of exp(s[t, i] - m[t])
    P[t, i] = exp(s[t, i] - m[t]) / z[t], and 0 where t does not see i
    out[t]  = sum over i of P[t, i] * value[i, n, :]       with P rounded to the dtype of value

t does not see i where atten_mask[t, i] != 0, or, with `causal`, where the window of i ends behind t: where
i * d + l - 1 > t. Where a query token sees nothing, P and the output are 0, m is the lowest float32 and z is 0.

Block j of a head has the importance imp[h, j] that block_scores.py gives P. There are nb = ceil(S2 / M) blocks, where a
block is M = l' / d strides long; with num_local_blocks, at least ceil(S1 / l'), so that every query token is in one.
The ids of kv head n are

    the blocks that are forced, by ascending number,
    then the others by descending score[n, j] = sum over the heads h of kv head n of imp[h, j],
    equal ones by ascending number, then -1

cut after select_block_count. NaN counts as a score of 0. Block j is forced for t where topk_mask[t, j] != 0, where
j < num_init_blocks, and where t // l' - num_local_blocks < j <= t // l'. No block is left out for lying behind t.

The statistics m and z, each 8 times, stand head after head within a segment: those of segment b are [N1, S1, 8], at the
place where [S1, N1, 8] would be. Query tokens behind the last segment see nothing and have no blocks.

The gradient is that of out, made from P = exp(s - m) / z with m and z as given:

    value_grad[i, n, :] = sum over t and h of  P[t, i] * grad[t, h, :]
    dS[t, i]            = P[t, i] * (grad[t, h, :] . value[i, n, :]  -  grad[t, h, :] . out[t, h, :])
    query_grad[t, h, :] = scale * sum over i of  dS[t, i] * key[i, n, :]
    key_grad[i, n, :]   = scale * sum over t and h of  dS[t, i] * query[t, h, :]

Everything is float32, or float64 for float64 tensors, but for the statistics, which are float32 always; results are
rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_triton.ops._common import block_scores
from nsa_triton.ops._common.statistics import LOWEST, STATE

Ends = tuple[int, ...]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None,
    topk_mask: Tensor | None,
    query_ends: Ends,
    key_ends: Ends,
    scale: float,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    select_block_count: int,
    causal: bool,
    num_init_blocks: int,
    num_local_blocks: int,
    importance: str,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output [T1, N1, Dv], ids [T1, N2, K], m and z [T1, N1, 8] of query [T1, N1, Dk], key [T2, N2, Dk] and value.

    `precision` replaces that of every step: with the dtype of the tensors, the result is what eager PyTorch makes of
    them.
    """
    precision = precision or torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros((*query.shape[:2], value.shape[2]))
    ids = query.new_full((query.shape[0], key.shape[1], select_block_count), -1, dtype=torch.int32)
    largest = query.new_full(query.shape[:2], LOWEST, dtype=torch.float32)
    total = torch.zeros_like(largest)
    for queries, keys in segments(query_ends, key_ends):
        q, k, v = (tensor.to(precision) for tensor in (query[queries], key[keys], value[keys]))
        hidden = hidden_keys(q, k, atten_mask, compress_block_size, compress_stride, causal)
        weights, largest[queries], total[queries] = probabilities(q, k, scale, hidden)
        out[queries] = torch.einsum("tngi,ind->tngd", weights.to(value.dtype).to(precision), v).flatten(1, 2)
        sizes = (compress_block_size, compress_stride, select_block_size)
        scored = block_scores_of(weights, *sizes, importance, num_local_blocks)
        forced = forced_blocks(q, scored.shape[-1], topk_mask, select_block_size, num_init_blocks, num_local_blocks)
        ids[queries] = block_scores.best_blocks(scored, forced.unsqueeze(1), select_block_count)
    return out, ids, head_major(largest, query_ends), head_major(total, query_ends)


def scores(
    query: Tensor,
    key: Tensor,
    atten_mask: Tensor | None,
    query_ends: Ends,
    key_ends: Ends,
    scale: float,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    causal: bool,
    importance: str,
    num_local_blocks: int = 0,
) -> list[Tensor]:
    """The scores [S1, N2, nb] of each segment, no block forced: what the ids of `forward` are chosen by."""
    found = []
    precision = torch.promote_types(query.dtype, torch.float32)
    for queries, keys in segments(query_ends, key_ends):
        q, k = query[queries].to(precision), key[keys].to(precision)
        hidden = hidden_keys(q, k, atten_mask, compress_block_size, compress_stride, causal)
        weights, _, _ = probabilities(q, k, scale, hidden)
        sizes = (compress_block_size, compress_stride, select_block_size)
        found.append(block_scores_of(weights, *sizes, importance, num_local_blocks))
    return found


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    atten_mask: Tensor | None,
    query_ends: Ends,
    key_ends: Ends,
    scale: float,
    compress_block_size: int,
    compress_stride: int,
    causal: bool,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, with their shapes and dtypes, from that of the output."""
    precision = precision or torch.promote_types(query.dtype, torch.float32)
    query_grad, key_grad, value_grad = (torch.zeros_like(tensor) for tensor in (query, key, value))
    largest, total = (query_major(statistic, query_ends) for statistic in (softmax_max, softmax_sum))
    for queries, keys in segments(query_ends, key_ends):
        q, out, g = (in_groups(tensor[queries].to(precision), key) for tensor in (query, attention_out, grad))
        k, v = key[keys].to(precision), value[keys].to(precision)
        m, z = (in_groups(statistic[queries].unsqueeze(-1), key) for statistic in (largest, total))
        hidden = hidden_keys(q, k, atten_mask, compress_block_size, compress_stride, causal)
        s = torch.einsum("tngd,ind->tngi", q, k) * scale
        p = (torch.exp(s - m) / z).masked_fill(hidden[:, None, None] | (z == 0), 0.0).to(precision)
        delta = (g * out).sum(-1, keepdim=True)
        ds = p * (torch.einsum("tngd,ind->tngi", g, v) - delta)
        query_grad[queries] = (torch.einsum("tngi,ind->tngd", ds, k) * scale).flatten(1, 2)
        key_grad[keys] = torch.einsum("tngi,tngd->ind", ds, q) * scale
        value_grad[keys] = torch.einsum("tngi,tngd->ind", p, g)
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


def hidden_keys(query: Tensor, key: Tensor, atten_mask: Tensor | None, block: int, stride: int, causal: bool) -> Tensor:
    """[S1, S2], true where t does not see i."""
    if atten_mask is not None:
        return atten_mask[: len(query), : len(key)] != 0
    token, window = (torch.arange(len(tensor), device=tensor.device) for tensor in (query, key))
    last_token = window * stride + block - 1
    return (last_token > token.unsqueeze(1)) & causal


def forced_blocks(
    query: Tensor, blocks: int, topk_mask: Tensor | None, select: int, initial: int, local: int
) -> Tensor:
    """[S1, nb], true where a block comes before all that are not forced."""
    if topk_mask is not None:
        return topk_mask[: len(query), :blocks] != 0
    token, block = (torch.arange(count, device=query.device) for count in (len(query), blocks))
    own = token.unsqueeze(1) // select
    return (block < initial) | ((own - local < block) & (block <= own))


def probabilities(query: Tensor, key: Tensor, scale: float, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P [S1, N2, G, S2], and m and z [S1, N1] in float32, of query [S1, N1, D] and key [S2, N2, D]."""
    s = torch.einsum("tngd,ind->tngi", in_groups(query, key), key) * scale
    s = s.masked_fill(hidden[:, None, None], -torch.inf)
    largest = torch.nn.functional.pad(s, (0, 1), value=-torch.inf).amax(-1, keepdim=True)  # there may be no key
    blind = largest == -torch.inf
    terms = torch.exp(s - largest.masked_fill(blind, 0.0))  # -inf minus itself is NaN
    total = terms.sum(-1, keepdim=True)
    weights = terms / total.masked_fill(blind, 1.0)
    return weights, largest.float().masked_fill(blind, LOWEST).flatten(1), total.float().flatten(1)


def block_scores_of(weights: Tensor, block: int, stride: int, select: int, importance: str, local: int) -> Tensor:
    """score [S1, N2, nb] of P [S1, N2, G, S2]."""
    strides = select // stride
    blocks = -(-weights.shape[-1] // strides)
    if local:
        blocks = max(blocks, -(-weights.shape[0] // select))
    return block_scores.block_importance(weights, blocks, strides, block // stride, importance).sum(2)


def head_major(statistic: Tensor, query_ends: Ends) -> Tensor:
    """[T1, N1, 8] of m or z [T1, N1], head after head within each segment."""
    parts = [statistic[queries].t().flatten() for queries, _ in segments(query_ends, query_ends)]
    flat = torch.cat([*parts, statistic[query_ends[-1] :].flatten()])
    return flat.view(*statistic.shape, 1).repeat(1, 1, STATE)


def query_major(statistic: Tensor, query_ends: Ends) -> Tensor:
    """[T1, N1] of m or z [T1, N1, 8]: `head_major` backwards."""
    heads = statistic.shape[1]
    flat = statistic[..., 0].flatten()
    parts = [
        flat[queries.start * heads : queries.stop * heads].view(heads, -1).t()
        for queries, _ in segments(query_ends, query_ends)
    ]
    return torch.cat([*parts, flat[query_ends[-1] * heads :].view(-1, heads)])
