"""Plans and runs the launches of nsa_sliding_window_attention and its gradient, of `_common/attention_launch.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_triton.ops._common.attention_launch import (
    DKV,
    DQ,
    FWD,
    SUM,
    TERMS,
    RaggedPlan,
    gradients,
    plan_attention,
    plan_key_grads,
    plan_query_grad,
    plan_terms,
)
from nsa_triton.ops._common.tiles import Ragged
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, target_of

OP = "sliding_window_attention"
# BQ query tokens and BN keys per tile.
TILES = {FWD: ("BQ", "BN"), TERMS: ("BQ",), DQ: ("BQ", "BN"), DKV: ("BQ", "BN"), SUM: ("BP", "BE")}
LARGEST = 1 << 30  # window, beyond every sequence: kernels add positions to it as int32


def plan_call(target: Target, query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, window: int) -> RaggedPlan:
    """What the launches of one call share."""
    sight = {"L": 1, "D": 1, "CAUSAL": True}
    shown = min(window, LARGEST)
    return RaggedPlan(target, OP, TILES, {"window": window}, query, key, value, ragged, sight, window=shown)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: tuple[int, ...],
    key_ends: tuple[int, ...],
    scale: float,
    window_size: int,
) -> tuple[Tensor, Tensor]:
    """Output [T, N1, DV] and log-sum-exp [T, N1]; the arguments are those of the operator."""
    plan = plan_call(target_of(query.device), query, key, value, Ragged(query_ends, key_ends), window_size)
    out = query.new_empty((plan.tokens, plan.heads, plan.value_dim))
    lse = query.new_empty((plan.heads, plan.tokens), dtype=torch.float32)
    # The kernel does not come to rows that are no segment's.
    end = query_ends[-1]
    out[end:], lse[:, end:] = 0, -torch.inf
    plan_attention(plan, query, key, value, scale, out, lse).run(plan.target, plan.device)
    return out, lse.t()


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    lse: Tensor,
    query_ends: tuple[int, ...],
    key_ends: tuple[int, ...],
    scale: float,
    window_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, shaped like them; the arguments are those of the operator."""
    plan = plan_call(target_of(query.device), query, key, value, Ragged(query_ends, key_ends), window_size)
    by_head = lse.t().contiguous()  # as it came out of `forward`
    return gradients(plan, grad, query, key, value, attention_out, (by_head,), scale)


def compile_plans(
    target: Target,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    window: int,
    tokens: int = 4096,
) -> list[Launch]:
    """Every launch of the op for one shape, on meta tensors: what `nsa-triton compile` gives to the Ascend compiler."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = (meta(tokens, h, d) for h, d in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)))
    out, term = meta(tokens, heads, value_dim), meta(heads, tokens, dtype=torch.float32)
    plan = plan_call(target, query, key, value, Ragged((tokens,), (tokens,)), window)
    given = {"q": query, "k": key, "v": value, "g": out, "lse": term, "delta": term}
    return [
        plan_attention(plan, query, key, value, 1.0, out, term),
        plan_terms(plan, out, out, (term,), term, term),
        plan_query_grad(plan, given, 1.0, query),
        *plan_key_grads(plan, given, 1.0, key, value),
    ]
