"""Plans and runs the launches of nsa_sliding_window_attention_infer: one, or two where the window is split."""

from __future__ import annotations

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

OP = "sliding_window_attention_infer"
STEP = 16  # what tiles are multiples of


def plan_launches(target: Target, call: PagedCall, window_size: int) -> list[Launch]:
    plan = call.plan(OP, target)
    config = plan.config(KERNEL, TILES, {"window": window_size})
    cut = cut_length(plan.page, config.tiles["BN"])
    window = min(window_size, plan.pages_per_batch * plan.page)
    longest = min(-(-window // STEP) * STEP, cut)
    pieces = Pieces(cuts_touched(window, cut, 1), 1, longest, cut, window=window)
    return plan_attention(plan, config, call, call.block_table, pieces)  # the kernel does not look at the ids


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    window_size: int,
) -> tuple[Tensor, Tensor]:
    """Output [T, N1, DV] and log-sum-exp [T, N1] on the device of `query`; the arguments are those of the operator."""
    target = target_of(query.device)
    call = call_on(query, key, value, block_table, lengths, rows, scale)
    for launch in plan_launches(target, call, window_size):
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
    window_size: int,
    page: int,
    tokens: int,
) -> list[Launch]:
    """Every launch of the op for one shape, on meta tensors: what `nsa-triton compile` gives to the Ascend compiler."""
    return plan_launches(
        target, meta_call(dtype, batch, heads, kv_heads, key_dim, value_dim, page, tokens), window_size
    )
