"""Plans and runs the launches of nsa_compress: tile tables, tiles, allocation. One code path for all targets.

A plan (a list of Launch values) is what `run` executes, and what the compile check hands to the Ascend compiler, with
meta tensors in place of real ones: what is checked is what runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_triton.ops._common.dense import with_dense_rows
from nsa_triton.ops._common.kernels import sum_parts
from nsa_triton.ops._common.plans import CallPlan
from nsa_triton.ops._common.tiles import split, table
from nsa_triton.ops._common.weights import head_major
from nsa_triton.ops.compress import kernels
from nsa_triton.runtime.configs import Config, lookup
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, target_of

OP = "compress"
# The tiles that each kernel takes from autotune_configs: BT tokens, BD columns of a head, BP partial sums per
# step, BE elements.
TILES = {
    "compress_fwd": ("BT", "BD"),
    "compress_bwd_dx": ("BT", "BD"),
    "compress_bwd_dw": ("BT", "BD"),
    "sum_parts": ("BP", "BE"),
}
# Stage one of the weight gradient is cut into about this many sums: enough for the cores of every known chip. A
# constant, because the order of summation, and with it every bit of the result, must not depend on cores or threads.
DW_PARTS = 256


@dataclass(frozen=True)
class Windows:
    """The windows of a ragged batch: what every tile and every size below follows from."""

    ends: tuple[int, ...]  # inclusive prefix sums of the segment lengths
    length: int  # L, tokens per window
    stride: int  # S, tokens between windows

    @property
    def rows(self) -> int:
        return int(segments(self)[3].sum())


@functools.lru_cache(maxsize=64)
def segments(windows: Windows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First token, tokens, first window (row of the output) and windows of each segment; cached by value."""
    ends = np.asarray(windows.ends, dtype=np.int64)
    lengths = np.diff(ends, prepend=0)
    counts = np.where(lengths >= windows.length, (lengths - windows.length) // windows.stride + 1, 0)
    return ends - lengths, lengths, np.cumsum(counts) - counts, counts


@functools.lru_cache(maxsize=64)
def window_tiles(windows: Windows, per_tile: int, device: torch.device) -> Tensor:
    """[tiles, 3] first token, first window and number of windows of every tile; cached by value, on the device."""
    first_token, _, first_row, counts = segments(windows)
    segment, first = split(counts, per_tile)
    columns = (
        first_token[segment] + first * windows.stride,
        first_row[segment] + first,
        np.minimum(per_tile, counts[segment] - first),
    )
    return table(columns, device)


@functools.lru_cache(maxsize=64)
def chunk_tiles(windows: Windows, per_tile: int, device: torch.device) -> Tensor:
    """[tiles, 5] first token, tokens and first stride-chunk of each tile, first row and windows of its segment."""
    first_token, lengths, first_row, counts = segments(windows)
    segment, first = split(-(-lengths // windows.stride), per_tile)
    offset = first * windows.stride
    columns = (
        first_token[segment] + offset,
        np.minimum(per_tile * windows.stride, lengths[segment] - offset),
        first,
        first_row[segment],
        counts[segment],
    )
    return table(columns, device)


class Plan(CallPlan):
    """What all launches of one call share: target, windows, shape, and how configs are looked up."""

    def __init__(self, target: Target, windows: Windows, x: Tensor) -> None:
        super().__init__(target, x)
        self.windows = windows
        self.tokens, self.heads, self.head_dim = x.shape

    def config(self, kernel: str) -> Config:
        length, stride = self.windows.length, self.windows.stride
        key = {
            "itemsize": self.dtype.itemsize,
            "head_dim": self.head_dim,
            "block": length,
            "stride": stride,
            "overhang": length % stride != 0,  # the last window of a token ends inside a stride
        }
        return lookup(OP, kernel, self.target, key, self.tokens, TILES[kernel])

    def columns(self, config: Config) -> tuple[int, int]:
        """Columns per tile, and the number of tiles that cover a head."""
        wide = min(config.tiles["BD"], self.target.tile(self.head_dim))
        return wide, -(-self.head_dim // wide)

    def window_tile(self, config: Config) -> tuple[int, dict[str, Any]]:
        """Windows per tile, and the constexprs that describe a tile of windows."""
        length, stride = self.windows.length, self.windows.stride
        per_tile = max(1, config.tiles["BT"] // stride)
        return per_tile, {
            "L": length,
            "S": stride,
            "BL": self.target.tile(length),
            "BR": self.target.tile((per_tile - 1) * stride + length),
            "RESIDENT": self.target.is_ascend_code,
        }


def plan_forward(plan: Plan, x: Tensor, w: Tensor, y: Tensor) -> Launch:
    config = plan.config("compress_fwd")
    wide, blocks = plan.columns(config)
    per_tile, tile = plan.window_tile(config)
    tiles = window_tiles(plan.windows, per_tile, plan.device)
    items = len(tiles) * plan.heads * blocks
    arguments = {
        "x": x, "w": w, "y": y, "tiles": tiles, "n_items": items, "N": plan.heads, "D": plan.head_dim,
        "x_t": x.stride(0), "x_n": x.stride(1),
    }  # fmt: skip
    return plan.launch(kernels.compress_fwd, items, arguments, {**tile, "BD": wide}, config)


def plan_input_grad(plan: Plan, g: Tensor, w: Tensor, dx: Tensor) -> Launch:
    config = plan.config("compress_bwd_dx")
    wide, blocks = plan.columns(config)
    length, stride = plan.windows.length, plan.windows.stride
    per_tile = max(1, config.tiles["BT"] // stride)
    tiles = chunk_tiles(plan.windows, per_tile, plan.device)
    items = len(tiles) * plan.heads * blocks
    arguments = {
        "g": g, "w": w, "dx": dx, "tiles": tiles, "n_items": items, "N": plan.heads, "D": plan.head_dim,
        "g_r": g.stride(0), "g_n": g.stride(1),
    }  # fmt: skip
    constexprs = {
        "L": length,
        "S": stride,
        "BC": plan.target.tile(per_tile),
        "BS": plan.target.tile(stride),
        "BD": wide,
    }
    return plan.launch(kernels.compress_bwd_dx, items, arguments, constexprs, config)


def plan_weight_grad(plan: Plan, g: Tensor, x: Tensor, dw: Tensor) -> tuple[Launch, Launch]:
    config = plan.config("compress_bwd_dw")
    wide, blocks = plan.columns(config)
    per_tile, tile = plan.window_tile(config)
    tiles = window_tiles(plan.windows, per_tile, plan.device)
    splits = max(1, min(len(tiles), DW_PARTS // (plan.heads * blocks)))
    partial = x.new_empty((splits * blocks, *dw.shape), dtype=torch.float32)
    items = splits * plan.heads * blocks
    arguments = {
        "g": g, "x": x, "partial": partial, "tiles": tiles, "n_tiles": len(tiles), "n_splits": splits,
        "n_items": items, "N": plan.heads, "D": plan.head_dim,
        "g_r": g.stride(0), "g_n": g.stride(1), "x_t": x.stride(0), "x_n": x.stride(1),
    }  # fmt: skip
    constexprs = {**tile, "BW": plan.target.tile(per_tile), "BD": wide}
    stage_one = plan.launch(kernels.compress_bwd_dw, items, arguments, constexprs, config)

    config = plan.config("sum_parts")
    arguments = {"parts": partial, "out": dw, "n_parts": len(partial), "size": dw.numel()}
    items = -(-dw.numel() // config.tiles["BE"])
    return stage_one, plan.launch(sum_parts, items, arguments, dict(config.tiles), config)


def forward(
    input: Tensor, weight: Tensor, compress_block_size: int, compress_stride: int, ends: tuple[int, ...]
) -> Tensor:
    """nsa_compress on the device of `input`, [T, N, D] -> [R, N, D]; there is at least one window."""
    windows = Windows(ends, compress_block_size, compress_stride)
    x = with_dense_rows(input)
    target = target_of(x.device)
    y = x.new_empty((windows.rows, *x.shape[1:]))
    plan_forward(Plan(target, windows, x), x, head_major(weight), y).run(target, x.device)
    return y


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    compress_block_size: int,
    compress_stride: int,
    ends: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Both gradients of nsa_compress, shaped like `input` and `weight`; there is at least one window."""
    g, x = with_dense_rows(grad), with_dense_rows(input)
    target = target_of(x.device)
    plan = Plan(target, Windows(ends, compress_block_size, compress_stride), x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for launch in (plan_input_grad(plan, g, head_major(weight), dx), *plan_weight_grad(plan, g, x, dw)):
        launch.run(target, x.device)
    return dx, dw


def compile_plans(
    target: Target, dtype: torch.dtype, heads: int, head_dim: int, block: int, stride: int, tokens: int = 4096
) -> list[Launch]:
    """Every launch of the op for one shape, on meta tensors: what `nsa-triton compile` gives to the Ascend compiler."""
    windows = Windows((tokens,), block, stride)
    x = torch.empty((tokens, heads, head_dim), dtype=dtype, device="meta")
    w = torch.empty((heads, block), dtype=dtype, device="meta")
    y = x.new_empty((windows.rows, heads, head_dim))
    plan = Plan(target, windows, x)
    return [plan_forward(plan, x, w, y), plan_input_grad(plan, y, w, x), *plan_weight_grad(plan, y, x, w.t())]
