"""Plans and runs the kernels of `attention_kernels.py` for the training operators that share them.

Forward: attention, which leaves the log-sum-exp of each row. Backward: what the softmax needs of each row, dq, then dk
and dv, in parts where tiles of keys are too few for the cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.ops._common import attention_kernels as kernels
from nsa_triton.ops._common.kernels import sum_parts
from nsa_triton.ops._common.plans import AttentionPlan
from nsa_triton.ops._common.statistics import STATE
from nsa_triton.ops._common.tiles import Ragged, key_tiles, query_tiles
from nsa_triton.runtime.configs import Config, lookup
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target

FWD, TERMS, DQ, DKV, SUM = "attention_fwd", "attention_terms", "attention_dq", "attention_dkv", "sum_parts"
# Tiles of keys times parts are about this many at least: enough for the cores of every known chip. A constant, because
# the order of summation, and with it every bit of the result, must not depend on cores or threads.
PARTS = 128


class RaggedPlan(AttentionPlan):
    """What the launches of one call share: target, batch, shapes, and which keys a query token sees.

    Args:
        tiles: by kernel, the names of the tile sizes in the configs of `op`.
        asked: what these configs are looked up by, besides sizes.
        sight: the constexprs L, D and CAUSAL.
        mask: hides keys from query tokens, if it is given.
        window: how many keys a query token sees; 0: any number. With a window the last query token of a segment stands
            at its last key, else the first at the first.
    """

    def __init__(
        self,
        target: Target,
        op: str,
        tiles: Mapping[str, tuple[str, ...]],
        asked: Mapping[str, Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ragged: Ragged,
        sight: Mapping[str, Any],
        mask: Tensor | None = None,
        window: int = 0,
    ) -> None:
        super().__init__(target, query, value)
        self.op, self.tiles, self.asked = op, tiles, asked
        self.keys, self.ragged, self.sight, self.mask, self.window = len(key), ragged, sight, mask, window
        of_mask = 0 if mask is None else mask.stride(0)
        strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2], of_mask)
        self.strides = dict(zip(("q_t", "q_h", "k_t", "k_n", "v_t", "v_n", "m_t"), strides, strict=True))

    def config(self, kernel: str, **more: Any) -> Config:
        key = {
            "itemsize": self.dtype.itemsize,
            "head_dim": max(self.key_dim, self.value_dim),
            "value_dim": self.value_dim,
            **self.asked,
            **more,
        }
        return lookup(self.op, kernel, self.target, key, self.tokens, self.tiles[kernel])

    def masked(self, otherwise: Tensor) -> Tensor:
        return otherwise if self.mask is None else self.mask

    @property
    def constexprs(self) -> dict[str, Any]:
        """Those that the kernels have in common, but for tiles."""
        flags = {"SLIDES": self.window > 0, "HIDES": self.mask is not None}
        return {"G": self.group, **self.sight, **flags, **self.head_tiles}


def plan_attention(
    plan: RaggedPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    statistics: tuple[Tensor, ...] = (),
) -> Launch:
    """`lse` [N1, T] is all that is left beside `out`, or maxima and sums [T, N1, STATE] are too."""
    config = plan.config(FWD)
    tiles = query_tiles(plan.ragged, config.tiles["BQ"], plan.device, at_end=plan.window > 0)
    items = len(tiles) * plan.heads
    largest, total = statistics or (tiles, tiles)
    arguments = {
        "q": query, "k": key, "v": value, "mask": plan.masked(tiles), "tiles": tiles, "o": out, "o_max": largest,
        "o_sum": total, "lse": lse, "scale": scale, "n_items": items, "N1": plan.heads, "T": plan.tokens,
        **plan.strides, "window": plan.window,
    }  # fmt: skip
    constexprs = {**plan.constexprs, "W": STATE if statistics else 0, **config.tiles}
    return plan.launch(kernels.attention_fwd, items, arguments, constexprs, config, uses_cube=True)


def plan_terms(
    plan: RaggedPlan, grad: Tensor, out: Tensor, statistics: tuple[Tensor, ...], lse: Tensor, delta: Tensor
) -> Launch:
    """`statistics` are maxima and sums, or the log-sum-exp [N1, T]."""
    config = plan.config(TERMS)
    tiles = query_tiles(plan.ragged, config.tiles["BQ"], plan.device)
    items = len(tiles) * plan.heads
    arguments = {
        "g": grad, "o": out, "o_max": statistics[0], "o_sum": statistics[-1], "tiles": tiles, "lse": lse,
        "delta": delta, "n_items": items, "N1": plan.heads, "T": plan.tokens, "g_t": grad.stride(0),
        "g_h": grad.stride(1), "o_t": out.stride(0), "o_h": out.stride(1),
    }  # fmt: skip
    sizes = {"DV": plan.value_dim, "BV": plan.target.tile(plan.value_dim)}
    constexprs = {"W": STATE if len(statistics) == 2 else 0, **config.tiles, **sizes}
    return plan.launch(kernels.attention_terms, items, arguments, constexprs, config)


def plan_query_grad(plan: RaggedPlan, given: dict[str, Tensor], scale: float, dq: Tensor) -> Launch:
    config = plan.config(DQ)
    tiles = query_tiles(plan.ragged, config.tiles["BQ"], plan.device, with_keys=True, at_end=plan.window > 0)
    items = len(tiles) * plan.heads
    strides = {"g_t": given["g"].stride(0), "g_h": given["g"].stride(1)}
    arguments = {
        **given, "mask": plan.masked(tiles), "tiles": tiles, "dq": dq, "scale": scale, "n_items": items,
        "N1": plan.heads, "T": plan.tokens, **strides, **plan.strides, "window": plan.window,
    }  # fmt: skip
    constexprs = {**plan.constexprs, **config.tiles}
    return plan.launch(kernels.attention_dq, items, arguments, constexprs, config, uses_cube=True)


def plan_key_grads(
    plan: RaggedPlan, given: dict[str, Tensor], scale: float, dk: Tensor, dv: Tensor
) -> Iterator[Launch]:
    config = plan.config(DKV)
    tiles = key_tiles(plan.ragged, config.tiles["BN"], plan.device, with_queries=True, at_end=plan.window > 0)
    items = len(tiles) * plan.kv_heads
    queries = int(plan.ragged.queries.max(initial=0))  # at most, of those that see a tile of keys
    if plan.window:
        queries = min(queries, plan.window + config.tiles["BN"] - 1)
    steps = -(-queries // config.tiles["BQ"]) * plan.group
    splits = max(1, min(steps, PARTS // max(1, items)))
    grads, rows = (dk, dv), plan.ragged.key_ends[-1]
    parts = [dk, dv]
    if splits > 1:
        # Zeros, because no kernel comes to segments without queries.
        parts = [
            torch.zeros((splits, rows, *grad.shape[1:]), dtype=torch.float32, device=plan.device) for grad in grads
        ]
    strides = {"g_t": given["g"].stride(0), "g_h": given["g"].stride(1)}
    arguments = {
        **given, "mask": plan.masked(tiles), "tiles": tiles, "dk": parts[0], "dv": parts[1], "scale": scale,
        "n_items": items * splits, "n_splits": splits, "N2": plan.kv_heads, "T": plan.tokens, "S": rows,
        **strides, **plan.strides, "window": plan.window,
    }  # fmt: skip
    constexprs = {**plan.constexprs, **config.tiles}
    yield plan.launch(kernels.attention_dkv, items * splits, arguments, constexprs, config, uses_cube=True)
    if splits > 1:
        config = plan.config(SUM)
        for part, grad in zip(parts, grads, strict=True):
            size = part[0].numel()
            arguments = {"parts": part, "out": grad, "n_parts": splits, "size": size}
            items = -(-size // config.tiles["BE"])
            yield plan.launch(sum_parts, items, arguments, dict(config.tiles), config)


def gradients(
    plan: RaggedPlan,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    statistics: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of query, key and value, shaped like them. `statistics` as in `plan_terms`."""
    # The kernels do not come to rows that are no segment's, nor to segments without queries or without keys.
    new = torch.empty_like if plan.ragged.fills(plan.tokens, plan.keys) else torch.zeros_like
    dq, dk, dv = (new(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    lse, delta = query.new_empty((2, plan.heads, plan.tokens), dtype=torch.float32)
    given = {"q": query, "k": key, "v": value, "g": grad, "lse": lse, "delta": delta}
    plan_terms(plan, grad, attention_out, statistics, lse, delta).run(plan.target, plan.device)
    plan_query_grad(plan, given, scale, dq).run(plan.target, plan.device)
    for launch in plan_key_grads(plan, given, scale, dk, dv):
        launch.run(plan.target, plan.device)
    return dq, dk, dv
