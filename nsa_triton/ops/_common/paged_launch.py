"""Plans the launches of attention over a paged cache: one, or two where the pieces are dealt to several splits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common import paged_kernels
from nsa_triton.ops._common.paged_plan import JOINED, PagedPlan
from nsa_triton.ops._common.statistics import STATE
from nsa_triton.runtime.configs import Config
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target

KERNEL = "paged_split"  # whose config it is
# BH heads per tile (at most a group), BN tokens per tile (at most a piece).
TILES = ("BH", "BN")


class PagedCall(NamedTuple):
    """The tensors of one call, as paged_contract names them, and where its results go."""

    query: Tensor
    key: Tensor
    value: Tensor
    block_table: Tensor
    lengths: Tensor
    rows: Tensor | None
    scale: float
    out: Tensor  # [T, N1, DV]
    lse: Tensor  # [T, N1] float32

    def plan(self, op: str, target: Target) -> PagedPlan:
        return PagedPlan(op, target, self.query, self.key, self.value, self.block_table)


class Pieces(NamedTuple):
    """The tokens that a query token attends to, as loads: the constexprs of the kernel, but for `longest`."""

    dealt: int  # K: what splits share: blocks of several pieces each, or pieces
    each: int  # PIECES
    longest: int  # tokens of a piece, at most
    cut: int
    block: int = 0
    window: int = 0


def cuts_touched(tokens: int, cut: int, step: int) -> int:
    """How many cuts a run of tokens may touch that begins anywhere, in steps of `step` tokens."""
    return -(-(cut - step + tokens) // cut)


def plan_attention(plan: PagedPlan, config: Config, call: PagedCall, ids: Tensor, pieces: Pieces) -> list[Launch]:
    heads = min(config.tiles["BH"], plan.group)
    items = plan.batch * plan.kv_heads * -(-plan.group // heads)
    splits = plan.target.splits(items, most=pieces.dealt)
    part, state = call.out, call.lse
    if splits > 1:
        part = call.out.new_empty((plan.tokens, plan.heads, splits, plan.value_dim), dtype=torch.float32)
        state = call.out.new_empty((plan.tokens, plan.heads, splits, STATE), dtype=torch.float32)
    arguments = {
        "q": call.query, "k": call.key, "v": call.value, "ids": ids, "table": call.block_table,
        "lengths": call.lengths, "rows": _rows(call), "o": part, "state": state, "scale": call.scale,
        "n_items": items * splits, **_numbers(plan), "n_table": plan.pages_per_batch, "n_pages": plan.pages,
        "N2": plan.kv_heads, **plan.strides,
    }  # fmt: skip
    constexprs = {
        "G": plan.group, "K": pieces.dealt, "L": pieces.block, "WINDOW": pieces.window, "P": plan.page,
        "CUT": pieces.cut, "PIECES": pieces.each, "SPLITS": splits, "W": STATE, "RAGGED": call.rows is not None,
        "BH": plan.dot_tile(heads), "BN": plan.dot_tile(pieces.longest), **plan.head_tiles,
    }  # fmt: skip
    split = plan.launch(paged_kernels.paged_split, items * splits, arguments, constexprs, config, uses_cube=True)
    return [split] if splits == 1 else [split, _plan_join(plan, config, call, part, state)]


def _plan_join(plan: PagedPlan, config: Config, call: PagedCall, part: Tensor, state: Tensor) -> Launch:
    items, splits = plan.batch * plan.heads, part.shape[2]
    arguments = {
        "o": part, "state": state, "rows": _rows(call), "out": call.out, "lse": call.lse, "n_items": items,
        **_numbers(plan), "N1": plan.heads,
    }  # fmt: skip
    constexprs = {
        "SPLITS": splits, "W": STATE, "RAGGED": call.rows is not None, "BS": plan.target.tile(splits),
        "BP": plan.target.tile(min(splits, JOINED)),
        "DV": plan.value_dim, "BV": plan.target.tile(plan.value_dim),
    }  # fmt: skip
    return plan.launch(paged_kernels.paged_join, items, arguments, constexprs, config)


def _rows(call: PagedCall) -> Tensor:
    return call.lengths if call.rows is None else call.rows


def _numbers(plan: PagedPlan) -> dict[str, int]:
    return {"n_tokens": plan.tokens // plan.batch, "n_all": plan.tokens}


def call_on(
    query: Tensor, key: Tensor, value: Tensor, block_table: Tensor, lengths: Tensor, rows: Tensor | None, scale: float
) -> PagedCall:
    """The call, with new tensors for its results."""
    shape = (*query.shape[:2], value.shape[3])
    if rows is None:
        out, lse = query.new_empty(shape), query.new_empty(shape[:2], dtype=torch.float32)
    else:  # the kernels do not come to rows that are nobody's
        out = query.new_zeros(shape)
        lse = query.new_full(shape[:2], float("-inf"), dtype=torch.float32)
    return PagedCall(query, key, value, block_table, lengths, rows, scale, out, lse)


def meta_call(
    dtype: torch.dtype, batch: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, page: int, tokens: int
) -> PagedCall:
    """A call on meta tensors, to be compiled: `tokens` query tokens per batch on a cache of 4096."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, lengths = meta(batch * tokens, heads, key_dim), meta(batch, dtype=torch.int32)
    key, value = meta(1024, page, kv_heads, key_dim), meta(1024, page, kv_heads, value_dim)
    return call_on(query, key, value, meta(batch, -(-4096 // page), dtype=torch.int32), lengths, None, 1.0)
