"""Plans and runs the two launches of nsa_compress_attention_infer: attention with block sums, then the best blocks.

Where a batch has several query tokens, their queries are copied first, into the order of the kernel's rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa_triton.ops._common.geometry import Geometry
from nsa_triton.ops._common.paged_plan import JOINED, PagedPlan
from nsa_triton.ops._common.plans import cut_length
from nsa_triton.ops._common.statistics import STATE
from nsa_triton.ops.compress_attention_infer import kernels
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, target_of

OP = "compress_attention_infer"
# BR rows (heads times query tokens) and BN compressed tokens per tile; BE blocks that are looked at at once.
SPLIT, CHOOSE = "compress_attention_split", "compress_attention_choose"
TILES = {SPLIT: ("BR", "BN"), CHOOSE: ("BE",)}
MOST_QUERIES = 4  # query tokens per tile


@dataclass(frozen=True)
class TileGeometry(Geometry):
    """How tiles of compressed tokens lie to selection blocks."""

    cut: int  # compressed tokens per tile

    @property
    def phases(self) -> int:
        return 1 if self.cut % self.strides == 0 else self.strides

    @property
    def completed(self) -> int:
        """The most blocks whose last token a tile may hold; it may touch two more."""
        return -(-self.cut // self.strides)

    def first_block(self, tile: np.ndarray | int) -> np.ndarray | int:
        return (tile * self.cut + self.shift + self.strides - 1) // self.strides - 1


@functools.lru_cache(maxsize=64)
def fold_weights(geometry: TileGeometry, tokens: int, columns: int, device: torch.device) -> Tensor:
    """[phases, tokens, columns] how often a token of a tile counts for a block, by the distance of tile and block."""
    distance = np.arange(geometry.strides) if geometry.phases > 1 else np.array([_phase(geometry, 0)])
    offset = geometry.strides * np.arange(columns) - np.arange(tokens)[:, None] + distance[:, None, None]
    counts = geometry.multiplicity(offset)
    counts[:, geometry.cut :] = 0
    return torch.from_numpy(counts.astype(np.float32)).to(device)


def _phase(geometry: TileGeometry, tile: int) -> int:
    return (int(geometry.first_block(tile)) + 1) * geometry.strides - geometry.shift - tile * geometry.cut


@functools.lru_cache(maxsize=64)
def first_blocks(geometry: TileGeometry, tiles: int, device: torch.device) -> Tensor:
    """[tiles] the first block that the tokens of each tile may count for, as float32."""
    return torch.from_numpy(np.asarray(geometry.first_block(np.arange(tiles)), dtype=np.float32)).to(device)


def _eights(count: int) -> int:
    """The multiple of eight, 16 or more, that holds `count` floats: rows of 64 bytes or more."""
    return max(16, -(-count // 8) * 8)


class Forced(NamedTuple):
    """How many blocks are always chosen: first ones, and last ones up to that of the query token if `own`, else up to
    the last that windows touch."""

    init: int
    local: int
    own: bool

    @classmethod
    def of(cls, num_init_blocks: int | None, num_local_blocks: int | None) -> Forced:
        if num_init_blocks is None and num_local_blocks is None:
            return cls(1, 2, False)  # as CANN does
        return cls(num_init_blocks or 0, num_local_blocks or 0, True)


class Plan(PagedPlan):
    """The shapes, tiles and workspace of one call."""

    def __init__(
        self,
        target: Target,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_table: Tensor,
        geometry: Geometry,
        count: int,
    ) -> None:
        super().__init__(OP, target, query, key, value, block_table)
        each = -(-self.tokens // self.batch)
        self.split_config = self.config(SPLIT, TILES[SPLIT], {"queries": each, "strides": geometry.strides})
        self.choose_config = self.config(CHOOSE, TILES[CHOOSE], {"count": count})
        cut = cut_length(self.page, self.split_config.tiles["BN"])
        self.geometry = TileGeometry(geometry.block, geometry.stride, geometry.select, geometry.shift, cut)
        rows = self.split_config.tiles["BR"]
        self.head_rows = min(rows, self.group)
        self.queries = max(1, min(MOST_QUERIES, each, rows // self.group))
        self.columns = target.tile(_eights(self.geometry.completed))
        self.touched = self.dot_tile(_eights(self.geometry.completed + 2))
        self.tiles = -(-self.pages_per_batch * self.page // self.geometry.cut)
        self.items = self.batch * self.kv_heads * -(-self.group // self.head_rows)
        self.splits = target.splits(self.items, most=self._most_splits())
        self.direct = self.splits == 1 and self.queries == 1
        self.workspace = self._workspace()

    def _most_splits(self) -> int:
        """As many as make the outputs of splits, written and read in float32, a twentieth of the keys and values."""
        of_output = self.group * self.value_dim * 8
        of_token = (self.key_dim + self.value_dim) * self.dtype.itemsize
        return max(1, self.tiles * self.geometry.cut * of_token // (20 * of_output))

    def _workspace(self) -> dict[str, Tensor]:
        """What the first launch leaves for the second: M times less than a float32 score per head and token."""
        rows = (self.kv_heads, self.tokens, self.group)
        shapes = {
            "o": (*rows, 0 if self.direct else self.splits, self.value_dim),
            "state": (*rows, self.splits, STATE),
            "sums": (*rows, self.tiles, self.columns),
            "edges": (*rows, self.tiles + 1, STATE),
        }
        return {name: torch.empty(shape, dtype=torch.float32, device=self.device) for name, shape in shapes.items()}


def plan_split(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    raw_lengths: Tensor | None,
    scale: float,
    out: Tensor,
) -> Launch:
    geometry = plan.geometry
    heads, queries = plan.head_rows, plan.target.tile(plan.queries)
    if plan.target.is_ascend_code:
        # A tile of one row is not a matrix to the compiler; a second, masked one costs nothing.
        heads = max(heads, 2 if queries == 1 else 1)
    else:
        heads = max(plan.target.tile(heads), 16 // queries)
    tokens = plan.dot_tile(geometry.cut)
    if plan.queries > 1:  # by kv head, so that the rows of a tile lie evenly
        query = query.reshape(plan.tokens, plan.kv_heads, plan.group, plan.key_dim).transpose(0, 1).contiguous()
    arguments = {
        "q": query, "k": key, "v": value, "table": block_table, "lengths": lengths,
        "rows": lengths if rows is None else rows, "raw_lengths": lengths if raw_lengths is None else raw_lengths,
        "weights": fold_weights(geometry, tokens, plan.touched, plan.device),
        **plan.workspace, **({"o": out} if plan.direct else {}), "scale": scale,
        "n_items": plan.items * plan.splits, "n_tokens": plan.tokens // plan.batch, "n_all": plan.tokens,
        "n_table": plan.pages_per_batch, "n_pages": plan.pages, "n_tiles_all": plan.tiles, "N2": plan.kv_heads,
        **plan.strides,
    }  # fmt: skip
    constexprs = {
        "G": plan.group, "P": plan.page, "CUT": geometry.cut, "L": geometry.block, "D": geometry.stride,
        "M": geometry.strides, "SHIFT": geometry.shift, "PHASES": geometry.phases, "SPLITS": plan.splits,
        "DIRECT": plan.direct, "W": STATE, "RAGGED": rows is not None,
        "HIDES": raw_lengths is not None and (rows is not None or plan.tokens > plan.batch),
        "BQ": queries, "BH": heads, "BN": tokens, "BC": plan.touched, "BJ": plan.columns,
        **plan.head_tiles,
    }  # fmt: skip
    items = plan.items * plan.splits
    return plan.launch(
        kernels.compress_attention_split, items, arguments, constexprs, plan.split_config, uses_cube=True
    )


def plan_choose(
    plan: Plan,
    lengths: Tensor,
    rows: Tensor | None,
    raw_lengths: Tensor | None,
    out: Tensor,
    ids: Tensor,
    forced: Forced,
) -> Launch:
    geometry, target = plan.geometry, plan.target
    tiles = max(1, plan.choose_config.tiles["BE"] // plan.columns)
    if not target.is_ascend_code:
        tiles = 1 << tiles.bit_length() - 1  # the power of two below
    items = plan.batch * plan.kv_heads
    chunks = -(-(plan.tiles + 1) // tiles)
    arguments = {
        **plan.workspace, "firsts": first_blocks(geometry, (chunks + 1) * tiles + 1, plan.device), "lengths": lengths,
        "rows": lengths if rows is None else rows, "raw_lengths": lengths if raw_lengths is None else raw_lengths,
        "out": out, "ids": ids, "n_items": items, "n_tokens": plan.tokens // plan.batch, "n_all": plan.tokens,
        "n_tiles_all": plan.tiles, "N2": plan.kv_heads,
    }  # fmt: skip
    count = ids.shape[2]
    constexprs = {
        "G": plan.group, "K": count, "CUT": geometry.cut, "L": geometry.block, "D": geometry.stride,
        "BLOCK": geometry.select, "INIT": forced.init, "LOCAL": forced.local, "OWN": forced.own,
        "SPLITS": plan.splits, "DIRECT": plan.direct, "W": STATE, "RAGGED": rows is not None,
        "BS": target.tile(plan.splits), "BP": target.tile(min(plan.splits, JOINED)), "BJ": plan.columns,
        "BT": tiles, "CHUNKED": chunks > 1, "BC": target.tile(count),
        "DV": plan.value_dim, "BV": target.tile(plan.value_dim),
    }  # fmt: skip
    return plan.launch(kernels.compress_attention_choose, items, arguments, constexprs, plan.choose_config)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    raw_lengths: Tensor | None,
    scale: float,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    select_block_count: int,
    importance: str,
    num_init_blocks: int | None = None,
    num_local_blocks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [T, N1, DV] and ids [T, N2, K] on the device of `query`; the arguments are those of the operator."""
    target = target_of(query.device)
    geometry = Geometry(compress_block_size, compress_stride, select_block_size, int(importance == "overlap"))
    plan = Plan(target, query, key, value, block_table, geometry, select_block_count)
    out = query.new_empty((plan.tokens, plan.heads, plan.value_dim))
    ids = query.new_empty((plan.tokens, plan.kv_heads, select_block_count), dtype=torch.int32)
    if rows is not None:  # the kernels do not come to rows that are nobody's
        out.zero_()
        ids.fill_(-1)
    split = plan_split(plan, query, key, value, block_table, lengths, rows, raw_lengths, scale, out)
    forced = Forced.of(num_init_blocks, num_local_blocks)
    for launch in (split, plan_choose(plan, lengths, rows, raw_lengths, out, ids, forced)):
        launch.run(target, query.device)
    return out, ids


def compile_plans(
    target: Target,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    compress_block_size: int,
    compress_stride: int,
    block: int,
    count: int,
    page: int,
    tokens: int,
    max_tokens: int,
) -> list[Launch]:
    """Every launch of the op for one shape, on meta tensors: what `nsa-triton compile` gives to the Ascend compiler."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, ints = batch * tokens, torch.int32
    query, lengths = meta(rows, heads, key_dim), meta(batch, dtype=ints)
    key, value = meta(1024, page, kv_heads, key_dim), meta(1024, page, kv_heads, value_dim)
    table = meta(batch, -(-max_tokens // page), dtype=ints)
    geometry = Geometry(compress_block_size, compress_stride, block, 0)
    plan = Plan(target, query, key, value, table, geometry, count)
    hides = lengths if tokens > 1 else None
    out, ids = meta(rows, heads, value_dim), meta(rows, kv_heads, count, dtype=ints)
    return [
        plan_split(plan, query, key, value, table, lengths, None, hides, 1.0, out),
        plan_choose(plan, lengths, None, lengths, out, ids, Forced.of(None, None)),
        plan_choose(plan, lengths, None, lengths, out, ids, Forced.of(1, 2)),
    ]
