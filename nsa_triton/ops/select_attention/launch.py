"""Plans and runs the launches of nsa_select_attention and its gradient.

Forward: the union of the ids of each tile of query tokens, then attention. Backward: the same union, what the rows of
the softmax need, dq; then the inverse index (count, place, fill), dk and dv in parts, and their sums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_triton.ops._common.plans import AttentionPlan, cut_length
from nsa_triton.ops._common.statistics import LOWEST, STATE
from nsa_triton.ops._common.tiles import Ragged, key_tiles, query_tiles, split, table
from nsa_triton.ops.select_attention import kernels, list_kernels
from nsa_triton.runtime.configs import Config, lookup
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, target_of

OP = "select_attention"
# BR rows (heads times query tokens) and BN key tokens per tile; BC entries that are compared at once; BM rows.
UNION, FWD, TERMS, DQ = (f"select_attention_{name}" for name in ("union", "fwd", "terms", "dq"))
COUNT, PLACE, DKV, SUM = (f"select_attention_{name}" for name in ("count", "place", "dkv", "sum"))
TILES = {
    UNION: ("BC",),
    FWD: ("BR", "BN"),
    TERMS: ("BM",),
    DQ: ("BR", "BN"),
    COUNT: ("BT",),
    PLACE: ("BO",),
    DKV: ("BN",),
    SUM: ("BM",),
}
GROUP = 8  # blocks whose tiles are counted at once
PARTS = 256  # so many parts the lists of tiles are cut into at least, enough for the cores of every known chip
MOST_TOKENS = 16  # query tokens per tile
MOST_ENTRIES = 256  # ids per tile, if it has several tokens
# The union's tile is as wide as need be up to the first of these, then one of the others: the compilers share buffers
# once there is no room without, so that with 136 columns they need less of the unified buffer than with 100.
UNION_WIDTHS = (40, 72, 136, 264)


def tiles_with_keys(ragged: Ragged, per_tile: int) -> np.ndarray:
    """[B] tiles of query tokens of each segment, none where it has no keys."""
    tiles: np.ndarray = np.where(ragged.keys > 0, -(-ragged.queries // per_tile), 0)
    return tiles


@functools.lru_cache(maxsize=64)
def block_groups(
    ragged: Ragged, block: int, per_group: int, per_tile: int, causal: bool, device: torch.device
) -> Tensor:
    """[groups, 6] of neighbouring blocks of a segment: the row of the first in key_tiles, and how many; the number of
    the first within the segment; the tiles of query_tiles that may see them, from the first to behind the last; the
    number of the first of these within the segment."""
    blocks, tiles = -(-ragged.keys // block), tiles_with_keys(ragged, per_tile)
    segment, first = split(blocks, per_group)
    first_block, first_tile = np.cumsum(blocks) - blocks, np.cumsum(tiles) - tiles
    unseen = np.minimum(first * block // per_tile, tiles[segment]) if causal else np.zeros_like(first)
    columns = (
        first_block[segment] + first,
        np.minimum(per_group, blocks[segment] - first),
        first,
        first_tile[segment] + unseen,
        first_tile[segment] + tiles[segment],
        unseen,
    )
    return table(columns, device)


class Plan(AttentionPlan):
    """Target, shapes and tiles of one call: forward, or backward."""

    def __init__(
        self,
        target: Target,
        kernel: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        topk_indices: Tensor,
        ragged: Ragged,
        block: int,
        causal: bool,
    ) -> None:
        super().__init__(target, query, value)
        self.ragged, self.block, self.causal, self.count = ragged, block, causal, topk_indices.shape[2]
        rows = self.config(kernel).tiles["BR"]
        self.head_rows = min(rows, self.group)
        self.tiles_per_group = -(-self.group // self.head_rows)
        self.pack = max(1, min(MOST_TOKENS, MOST_ENTRIES // self.count, rows // self.group))
        self.entries = self.pack * self.count
        # Backward, nothing is done for segments without keys.
        self.tiles = query_tiles(ragged, self.pack, self.device, with_keys=kernel == DQ)
        self.ids = topk_indices.transpose(0, 1).contiguous()
        self.union_width = -(-(self.entries + 1) // 8) * 8
        self.union = self.ids.new_empty((self.kv_heads, len(self.tiles), self.union_width))
        self.keys = {"k_t": key.stride(0), "k_n": key.stride(1), "v_t": value.stride(0), "v_n": value.stride(1)}

    def config(self, kernel: str) -> Config:
        key = {
            "itemsize": self.dtype.itemsize,
            "head_dim": max(self.key_dim, self.value_dim),
            "value_dim": self.value_dim,
            "group": self.group,
            "block": self.block,
            "count": self.count,
        }
        if kernel in (UNION, COUNT):
            key["entries"] = self.entries  # known from the tiles of the kernels with products
        return lookup(OP, kernel, self.target, key, self.tokens, TILES[kernel])

    # ---- row order ----

    @property
    def by_kv_head(self) -> bool:
        """Whether rows lie as [N2, T, G], so that those of several tokens are neighbours; else as [T, N2, G]."""
        return self.pack > 1 and self.kv_heads > 1

    @property
    def row_strides(self) -> dict[str, int]:
        if self.by_kv_head:
            return {"r_t": self.group, "r_n": self.tokens * self.group}
        return {"r_t": self.heads, "r_n": self.group}

    def in_rows(self, tensor: Tensor) -> Tensor:
        """[T, N1, ...] in row order."""
        if self.by_kv_head:
            tensor = tensor.reshape(self.tokens, self.kv_heads, self.group, -1).transpose(0, 1)
        return tensor.contiguous()

    def new_rows(self, size: int, dtype: torch.dtype) -> Tensor:
        """For [T, N1, size] in row order."""
        shape = (self.tokens, self.kv_heads, self.group, size)
        if self.by_kv_head:
            shape = (self.kv_heads, self.tokens, self.group, size)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def from_rows(self, rows: Tensor, behind: float) -> Tensor:
        """[T, N1, size], with `behind` in the rows behind the last segment, where no kernel comes to."""
        if self.by_kv_head:
            rows = rows.transpose(0, 1)
        tensor = rows.reshape(self.tokens, self.heads, rows.shape[-1])
        tensor[self.ragged.query_ends[-1] :] = behind
        return tensor

    # ---- launches ----

    @property
    def tile_items(self) -> int:
        return len(self.tiles) * self.kv_heads * self.tiles_per_group

    @property
    def tile_arguments(self) -> dict[str, Any]:
        return {
            "n_items": self.tile_items, "n_tiles": len(self.tiles), "n_all": self.tokens, **self.row_strides,
            **self.keys,
        }  # fmt: skip

    def tile_constexprs(self, config: Config) -> dict[str, Any]:
        cut = cut_length(self.block, config.tiles["BN"])
        # A tile of one row is not a matrix to the compiler; a second, masked one costs nothing.
        rows = max(2, self.pack * self.head_rows)
        return {
            "G": self.group, "K": self.count, "L": self.block, "CUT": cut, "PACK": self.pack, "E": self.entries,
            "U": self.union_width,
            "CAUSAL": self.causal, "BH": self.head_rows, "BP": self.target.tile(self.pack), "BR": self.dot_tile(rows),
            "BN": self.dot_tile(cut), "BI": self.target.tile(self.count), **self.head_tiles,
        }  # fmt: skip


def plan_union(plan: Plan) -> Launch:
    config = plan.config(UNION)
    items = len(plan.tiles) * plan.kv_heads
    whole = -(-plan.entries // 16) * 16  # tiles of other lengths overflow the unified buffer
    arguments = {
        "ids": plan.ids, "tiles": plan.tiles, "union": plan.union, "n_items": items, "n_tiles": len(plan.tiles),
        "n_all": plan.tokens,
    }  # fmt: skip
    constexprs = {
        "K": plan.count, "L": plan.block, "E": plan.entries, "U": plan.union_width, "CAUSAL": plan.causal,
        "BC": min(config.tiles["BC"], plan.target.tile(whole)), "BE": plan.target.tile(_union_tile(plan.union_width)),
    }  # fmt: skip
    return plan.launch(list_kernels.select_attention_union, items, arguments, constexprs, config)


def _union_tile(width: int) -> int:
    if width <= UNION_WIDTHS[0]:
        return width
    return next((enough for enough in UNION_WIDTHS if width <= enough), width)


def plan_forward(plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float, outputs: list[Tensor]) -> Launch:
    config = plan.config(FWD)
    out, largest, total = outputs
    arguments = {
        "q": plan.in_rows(query), "k": key, "v": value, "ids": plan.ids, "union": plan.union, "tiles": plan.tiles,
        "o": out, "m": largest, "z": total, "scale": scale, **plan.tile_arguments,
    }  # fmt: skip
    constexprs = {**plan.tile_constexprs(config), "W": STATE}
    return plan.launch(kernels.select_attention_fwd, plan.tile_items, arguments, constexprs, config, uses_cube=True)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T1, N1, DV], and maxima and sums [T1, N1, 8] on the device of `query`; T1 is not 0."""
    ragged = Ragged(query_ends, key_ends)
    target = target_of(query.device)
    plan = Plan(target, FWD, query, key, value, topk_indices, ragged, select_block_size, causal)
    sizes = ((plan.value_dim, plan.dtype), (STATE, torch.float32), (STATE, torch.float32))
    outputs = [plan.new_rows(*size) for size in sizes]
    if plan.tile_items:
        _run(plan, (plan_union(plan), plan_forward(plan, query, key, value, scale, outputs)))
    out, largest, total = outputs
    return plan.from_rows(out, 0.0), plan.from_rows(largest, LOWEST), plan.from_rows(total, 0.0)


def plan_terms(plan: Plan, rows: dict[str, Tensor], largest: Tensor, total: Tensor) -> Launch:
    """What dq, dk and dv need of each row. m and z hold every number STATE times."""
    config = plan.config(TERMS)
    n_rows = plan.tokens * plan.heads
    arguments = {
        "g": rows["g"], "out": rows["out"], "m": plan.in_rows(largest[:, :, :1]), "z": plan.in_rows(total[:, :, :1]),
        "lse": rows["lse"], "delta": rows["delta"], "n_rows": n_rows,
    }  # fmt: skip
    constexprs = {"DV": plan.value_dim, "BM": config.tiles["BM"], "BV": plan.target.tile(plan.value_dim)}
    items = -(-n_rows // config.tiles["BM"])
    return plan.launch(kernels.select_attention_terms, items, arguments, constexprs, config)


def plan_query_grad(
    plan: Plan, rows: dict[str, Tensor], key: Tensor, value: Tensor, scale: float, query_grad: Tensor
) -> Launch:
    config = plan.config(DQ)
    arguments = {
        "q": rows["q"], "g": rows["g"], "k": key, "v": value, "lse": rows["lse"], "delta": rows["delta"],
        "ids": plan.ids, "union": plan.union, "tiles": plan.tiles, "dq": query_grad, "scale": scale,
        **plan.tile_arguments,
    }  # fmt: skip
    constexprs = plan.tile_constexprs(config)
    return plan.launch(kernels.select_attention_dq, plan.tile_items, arguments, constexprs, config, uses_cube=True)


class Inverse:
    """For every block the tiles that hold it: a row of `blocks` and a kv head make a row here."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        ragged, causal = plan.ragged, plan.causal
        self.blocks = key_tiles(ragged, plan.block, plan.device)
        self.groups = block_groups(ragged, plan.block, GROUP, plan.pack, causal, plan.device)
        self.rows = len(self.blocks) * plan.kv_heads
        blocks = -(-ragged.keys // plan.block)
        tiles = tiles_with_keys(ragged, plan.pack)
        bound = plan.kv_heads * int((tiles * np.minimum(blocks, plan.entries)).sum())
        parts = self.rows + PARTS
        new = functools.partial(torch.empty, device=plan.device)
        self.counts, self.places, self.parts, self.entries, self.part_rows = (
            new(size, dtype=torch.int32) for size in (self.rows, self.rows + 1, self.rows + 1, bound, parts)
        )
        self.most = new(8, dtype=torch.int32)  # of all entries: the parts decide the order of summation
        steps = -(-int(tiles.max()) // plan.config(COUNT).tiles["BT"])
        self.before = new((steps + 1, self.rows), dtype=torch.int32)
        self.key_grads, self.value_grads = (
            new((parts, plan.block, size), dtype=torch.float32) for size in (plan.key_dim, plan.value_dim)
        )


def plan_inverse(inverse: Inverse) -> tuple[Launch, Launch, Launch]:
    plan = inverse.plan
    config = plan.config(COUNT)  # of the fill too, which reads what is counted for each tile of it
    items = len(inverse.groups) * plan.kv_heads
    sizes = {
        "n_items": items, "n_groups": len(inverse.groups), "n_tiles": len(plan.tiles), "n_blocks": len(inverse.blocks),
        "n_rows": inverse.rows,
    }  # fmt: skip
    constexprs = {
        "E": plan.entries, "U": plan.union_width, "BT": config.tiles["BT"], "BE": plan.target.tile(plan.entries),
    }  # fmt: skip
    arguments = {
        "union": plan.union, "groups": inverse.groups, "before": inverse.before, "counts": inverse.counts, **sizes,
    }  # fmt: skip
    count = plan.launch(list_kernels.select_attention_count, items, arguments, {**constexprs, "BG": GROUP}, config)

    places = {"places": inverse.places, "parts": inverse.parts}
    arguments = {"counts": inverse.counts, **places, "most": inverse.most, "n_rows": inverse.rows}
    one = plan.config(PLACE)
    place = plan.launch(
        list_kernels.select_attention_place, 1, arguments, {"PARTS": PARTS, "BO": one.tiles["BO"]}, one
    )  # fmt: skip

    arguments = {
        "union": plan.union, "groups": inverse.groups, "before": inverse.before, **places, "entries": inverse.entries,
        "rows": inverse.part_rows, **sizes,
    }  # fmt: skip
    constexprs["PACK"] = plan.pack
    return count, place, plan.launch(list_kernels.select_attention_fill, items, arguments, constexprs, config)


def plan_key_grads(
    inverse: Inverse, rows: dict[str, Tensor], key: Tensor, value: Tensor, scale: float, grads: list[Tensor]
) -> tuple[Launch, Launch, Launch]:
    plan = inverse.plan
    config = plan.config(DKV)
    sizes = {"n_rows": inverse.rows, "n_blocks": len(inverse.blocks), "n_all": plan.tokens}
    arguments = {
        "q": rows["q"], "g": rows["g"], "k": key, "v": value, "lse": rows["lse"], "delta": rows["delta"],
        "ids": plan.ids, "blocks": inverse.blocks, "places": inverse.places, "parts": inverse.parts,
        "entries": inverse.entries, "rows": inverse.part_rows, "most": inverse.most, "dk": inverse.key_grads,
        "dv": inverse.value_grads, "scale": scale, **sizes, **plan.row_strides, **plan.keys,
    }  # fmt: skip
    constexprs = plan.tile_constexprs(config)
    del constexprs["E"], constexprs["U"]
    items = len(inverse.part_rows) * (plan.block // constexprs["CUT"])
    grad = plan.launch(kernels.select_attention_dkv, items, arguments, constexprs, config, uses_cube=True)
    sums = (
        _plan_sum(inverse, inverse.key_grads, scale, grads[0]), _plan_sum(inverse, inverse.value_grads, 1.0, grads[1])
    )  # fmt: skip
    return grad, *sums


def _plan_sum(inverse: Inverse, of_parts: Tensor, scale: float, grad: Tensor) -> Launch:
    plan = inverse.plan
    config = plan.config(SUM)
    tile, size = min(config.tiles["BM"], plan.target.tile(plan.block)), of_parts.shape[2]
    items = inverse.rows * -(-plan.block // tile)
    arguments = {
        "of_parts": of_parts, "parts": inverse.parts, "blocks": inverse.blocks, "out": grad, "scale": scale,
        "n_items": items, "n_blocks": len(inverse.blocks), "N2": plan.kv_heads,
    }  # fmt: skip
    constexprs = {"L": plan.block, "D": size, "BM": tile, "BD": plan.target.tile(size)}
    return plan.launch(kernels.select_attention_sum, items, arguments, constexprs, config)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value on the device of `query`; T1 is not 0."""
    ragged = Ragged(query_ends, key_ends)
    target = target_of(query.device)
    plan = Plan(target, DQ, query, key, value, topk_indices, ragged, select_block_size, causal)
    query_grad = plan.new_rows(plan.key_dim, plan.dtype)
    if not ragged.fills(plan.tokens, len(key)):
        query_grad.zero_()  # for segments without keys
    key_grad, value_grad = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=plan.device) for tensor in (key, value)
    )
    for tensor in (key_grad, value_grad):
        tensor[key_ends[-1] if plan.tile_items else 0 :] = 0.0
    if not plan.tile_items:
        return plan.from_rows(query_grad, 0.0), key_grad, value_grad
    rows = {"q": plan.in_rows(query), "g": plan.in_rows(grad), "out": plan.in_rows(attention_out)}
    rows |= {name: plan.new_rows(1, torch.float32) for name in ("lse", "delta")}
    launches = [
        plan_union(plan), plan_terms(plan, rows, softmax_max, softmax_sum),
        plan_query_grad(plan, rows, key, value, scale, query_grad),
    ]  # fmt: skip
    inverse = Inverse(plan)
    if inverse.rows:
        launches += plan_inverse(inverse)
        launches += plan_key_grads(inverse, rows, key, value, scale, [key_grad, value_grad])
    _run(plan, launches)
    return plan.from_rows(query_grad, 0.0), key_grad, value_grad


def _run(plan: Plan, launches: Iterable[Launch]) -> None:
    for launch in launches:
        launch.run(plan.target, plan.device)


def compile_plans(
    target: Target,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    block: int,
    count: int,
    causal: bool,
) -> list[Launch]:
    """Every launch of the op for one shape, on meta tensors: what `nsa-triton compile` gives to the Ascend compiler."""
    tokens = 1024

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = (meta(tokens, h, d) for h, d in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)))
    ids = meta(tokens, kv_heads, count, dtype=torch.int32)
    ragged = Ragged((tokens,), (tokens,))
    out, state = meta(tokens, heads, value_dim), meta(tokens, heads, STATE, dtype=torch.float32)
    plan = Plan(target, FWD, query, key, value, ids, ragged, block, causal)
    launches = [plan_union(plan), plan_forward(plan, query, key, value, 1.0, [out, state, state])]
    plan = Plan(target, DQ, query, key, value, ids, ragged, block, causal)
    inverse = Inverse(plan)
    rows = {"q": query, "g": out, "out": out, "lse": state, "delta": state}
    return [
        *launches, plan_union(plan), plan_terms(plan, rows, state, state),
        plan_query_grad(plan, rows, key, value, 1.0, query), *plan_inverse(inverse),
        *plan_key_grads(inverse, rows, key, value, 1.0, [key, value]),
    ]  # fmt: skip
