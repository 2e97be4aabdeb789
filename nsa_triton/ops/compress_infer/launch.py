"""Plans and runs the launch of nsa_compress_infer. One code path for all targets.

A plan (a Launch value) is what runs, and what the compile check hands to the Ascend compiler, with meta tensors in
place of real ones: what is checked is what runs. It depends on shapes only, never on lengths, slots or page ids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa_triton.ops._common.plans import CallPlan
from nsa_triton.ops._common.weights import head_major
from nsa_triton.ops.compress_infer import kernels
from nsa_triton.runtime.configs import lookup
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, target_of

OP = "compress_infer"
TILES = ("BD",)  # columns of a head


def piece(*sizes: int) -> int:
    """The largest power of two that divides all sizes: the tokens that are loaded at once."""
    common = math.gcd(*sizes)
    return common & -common


def loadable(indices: Tensor) -> Tensor:
    """Indices as the kernel loads them: dense, int32 or int64. Others are copied; they are small."""
    return (indices if indices.dtype in (torch.int32, torch.int64) else indices.to(torch.int32)).contiguous()


def first_tokens(lengths: Tensor) -> Tensor:
    """[B, 1] where each batch begins in packed tokens, int64 for the sake of bad lengths; computed on the device."""
    lengths = lengths.clamp(min=0)
    return (lengths.cumsum(0) - lengths)[:, None]


def plan_forward(
    target: Target,
    x: Tensor,
    w: Tensor,
    slots: Tensor,
    table: Tensor,
    lengths: Tensor,
    cache: Tensor,
    length: int,
    stride: int,
    new_tokens: int,
) -> Launch:
    """`x` is [pages, page, N, D] with page ids in `table`, or [T, N, D] with the first token of each batch in it.
    `w` is [N, L]."""
    paged = x.dim() == 4
    heads, size = x.shape[-2:]
    page = x.shape[1] if paged else stride
    rows = piece(length, stride, page)
    key = {"itemsize": x.element_size(), "head_dim": size, "piece": rows}
    config = lookup(OP, "compress_infer", target, key, new_tokens, TILES)
    wide = min(config.tiles["BD"], target.tile(-(-size // 16) * 16))
    batch, windows = slots.shape
    items = batch * windows * heads * -(-size // wide)
    arguments: dict[str, Tensor | int] = {
        "x": x, "w": w, "cache": cache, "lengths": lengths, "table": table, "slots": slots, "n_items": items,
        "n_pages": x.shape[0], "n_columns": table.shape[1], "n_rows": cache.shape[0], "new_tokens": new_tokens,
        "W": windows, "page": page, "N": heads, "D": size,
        "x_p": x.stride(0), "x_t": x.stride(-3), "x_n": x.stride(-2),
        "cache_r": cache.stride(0), "cache_n": cache.stride(1),
    }  # fmt: skip
    constexprs = {"L": length, "S": stride, "C": rows, "BD": wide, "PAGED": paged}
    return CallPlan(target, x).launch(kernels.compress_infer, items, arguments, constexprs, config)


def forward(
    input: Tensor,
    weight: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    cache: Tensor,
    compress_block_size: int,
    compress_stride: int,
    new_tokens: int,
) -> None:
    """Write the new windows into `cache`, on its device."""
    target = target_of(input.device)
    lengths = lengths.to(torch.int32).contiguous()
    slots = loadable(slot_mapping).view(len(lengths), -1)
    table = first_tokens(lengths) if block_table is None else loadable(block_table)
    numbers = (compress_block_size, compress_stride, new_tokens)
    w = head_major(weight)
    plan_forward(target, input, w, slots, table, lengths, cache, *numbers).run(target, input.device)


def compile_plans(
    target: Target,
    dtype: torch.dtype,
    heads: int,
    size: int,
    length: int,
    stride: int,
    page: int | None,
    *,
    batch: int = 32,
    new_tokens: int = 1,
) -> list[Launch]:
    """The launch for one shape, on meta tensors: what `nsa-triton compile` gives to the Ascend compiler.

    `page` is None for packed tokens.
    """
    x = torch.empty((64, *(() if page is None else (page,)), heads, size), dtype=dtype, device="meta")
    indices = torch.empty((batch, -(-new_tokens // stride)), dtype=torch.int32, device="meta")
    table = first_tokens(indices[:, 0]) if page is None else indices.new_empty((batch, 64))
    w, cache = x.new_empty((heads, length)), x.new_empty((64, heads, size))
    return [plan_forward(target, x, w, indices, table, indices[:, 0], cache, length, stride, new_tokens)]
