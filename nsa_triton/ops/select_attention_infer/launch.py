"""Plans and runs the launches of nsa_select_attention_infer: one, or two where the list of ids is split."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from nsa_triton.ops._common.paged_plan import JOINED, PagedPlan
from nsa_triton.ops._common.plans import cut_length
from nsa_triton.ops._common.statistics import STATE
from nsa_triton.ops.select_attention_infer import kernels
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, target_of

OP = "select_attention_infer"
# BH heads per tile (at most a group), BN tokens per tile (at most a piece: what a block and a page have in common).
TILES = ("BH", "BN")


def plan_launches(
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    block: int,
    out: Tensor,
    lse: Tensor,
) -> list[Launch]:
    plan = PagedPlan(OP, target, query, key, value, block_table)
    config = plan.config("select_attention_split", TILES, {"block": block})
    heads = min(config.tiles["BH"], plan.group)
    cut = cut_length(plan.page, config.tiles["BN"])
    count = topk_indices.shape[2]
    items = plan.batch * plan.kv_heads * -(-plan.group // heads)
    splits = target.splits(items, most=count)
    part, state = out, lse
    if splits > 1:
        part = out.new_empty((plan.tokens, plan.heads, splits, plan.value_dim), dtype=torch.float32)
        state = out.new_empty((plan.tokens, plan.heads, splits, STATE), dtype=torch.float32)
    batches = {"rows": lengths if rows is None else rows}
    numbers = {"n_tokens": plan.tokens // plan.batch, "n_all": plan.tokens}
    arguments = {
        "q": query, "k": key, "v": value, "ids": topk_indices, "table": block_table, "lengths": lengths,
        **batches, "o": part, "state": state, "scale": scale, "n_items": items * splits, **numbers,
        "n_table": plan.pages_per_batch, "n_pages": plan.pages, "N2": plan.kv_heads, **plan.strides,
    }  # fmt: skip
    constexprs = {
        "G": plan.group, "K": count, "L": block, "P": plan.page, "CUT": cut,
        # A block may begin anywhere, in steps of what it and a cut have in common.
        "PIECES": -(-(cut - gcd(block, cut) + block) // cut),
        "SPLITS": splits, "W": STATE, "RAGGED": rows is not None,
        "BH": plan.dot_tile(heads), "BN": plan.dot_tile(min(block, cut)), **plan.head_tiles,
    }  # fmt: skip
    first = plan.launch(kernels.select_attention_split, items * splits, arguments, constexprs, config, uses_cube=True)
    if splits == 1:
        return [first]
    items = plan.batch * plan.heads
    arguments = {
        "o": part, "state": state, **batches, "out": out, "lse": lse, "n_items": items, **numbers, "N1": plan.heads,
    }  # fmt: skip
    constexprs = {
        "SPLITS": splits, "W": STATE, "RAGGED": rows is not None, "BS": target.tile(splits),
        "BP": target.tile(min(splits, JOINED)),
        "DV": plan.value_dim, "BV": target.tile(plan.value_dim),
    }  # fmt: skip
    return [first, plan.launch(kernels.select_attention_join, items, arguments, constexprs, config)]


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
    tokens, heads, _ = query.shape
    shape = (tokens, heads, value.shape[3])
    if rows is None:
        out, lse = query.new_empty(shape), query.new_empty(shape[:2], dtype=torch.float32)
    else:  # the kernel does not come to rows that are nobody's
        out = query.new_zeros(shape)
        lse = query.new_full(shape[:2], float("-inf"), dtype=torch.float32)
    arguments = (query, key, value, topk_indices, block_table, lengths, rows, scale, block)
    for launch in plan_launches(target, *arguments, out, lse):
        launch.run(target, query.device)
    return out, lse


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

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = batch * tokens
    ints = torch.int32
    return plan_launches(
        target,
        meta(rows, heads, key_dim),
        meta(1024, page, kv_heads, key_dim),
        meta(1024, page, kv_heads, value_dim),
        meta(rows, kv_heads, count, dtype=ints),
        meta(batch, -(-4096 // page), dtype=ints),
        meta(batch, dtype=ints),
        None,
        1.0,
        block,
        meta(rows, heads, value_dim),
        meta(rows, heads, dtype=torch.float32),
    )
