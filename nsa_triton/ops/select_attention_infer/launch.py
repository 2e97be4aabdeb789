"""Plans and runs the launches of nsa_select_attention_infer: one, or two where the list of ids is split."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from nsa_triton.ops._common.paged_launch import (
    KERNEL,
    TILES,
    PagedCall,
    Pieces,
    call_on,
    cuts_touched,
    meta_call,
    plan_attention,
)
from nsa_triton.ops._common.plans import cut_length
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, target_of

OP = "select_attention_infer"


def plan_launches(target: Target, call: PagedCall, topk_indices: Tensor, block: int) -> list[Launch]:
    plan = call.plan(OP, target)
    config = plan.config(KERNEL, TILES, {"block": block})
    cut = cut_length(plan.page, config.tiles["BN"])
    each = cuts_touched(block, cut, gcd(block, cut))  # it begins in steps of what it and a cut have in common
    pieces = Pieces(topk_indices.shape[2], each, min(block, cut), cut, block=block)
    return plan_attention(plan, config, call, topk_indices, pieces)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Output [T, N1, DV] and log-sum-exp [T, N1] on the device of `query`; the arguments are those of the operator."""
    target = target_of(query.device)
    call = call_on(query, key, value, block_table, lengths, rows, scale)
    for launch in plan_launches(target, call, topk_indices, block):
        launch.run(target, query.device)
    return call.out, call.lse


def compile_plans(
    target: Target,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    block: int,
    count: int,
    page: int,
    tokens: int,
) -> list[Launch]:
    """Every launch of the op for one shape, on meta tensors: what `nsa-triton compile` gives to the Ascend compiler."""
    call = meta_call(dtype, batch, heads, kv_heads, key_dim, value_dim, page, tokens)
    ids = torch.empty((batch * tokens, kv_heads, count), dtype=torch.int32, device="meta")
    return plan_launches(target, call, ids, block)
