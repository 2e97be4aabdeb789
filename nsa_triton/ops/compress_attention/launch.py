"""Plans and runs the launches of nsa_compress_attention and its gradient.

Forward: attention, which leaves the log-sum-exp of each row; then, for so many query tokens at a time that the
scores of their blocks take little memory, the scores and the best blocks. Attention and its gradient are those of
`_common/attention_launch.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
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
from nsa_triton.ops._common.geometry import Geometry
from nsa_triton.ops._common.statistics import LOWEST, STATE
from nsa_triton.ops._common.tiles import Ragged, query_tiles
from nsa_triton.ops.compress_attention import kernels
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, target_of

OP = "compress_attention"
SCORES, CHOOSE = "compress_attention_scores", "compress_attention_choose"
# BQ query tokens and BN compressed tokens per tile; BR query tokens and BC blocks that are looked at at once.
TILES = {
    FWD: ("BQ", "BN"),
    SCORES: ("BQ", "BN"),
    CHOOSE: ("BR", "BC"),
    TERMS: ("BQ",),
    DQ: ("BQ", "BN"),
    DKV: ("BQ", "BN"),
    SUM: ("BP", "BE"),
}
CHUNK = 6144  # rows (query tokens times kv heads) whose block scores are in memory at a time


def counts(geometry: Geometry) -> np.ndarray:
    """[3, M] how often the tokens of a block count for it, for the next block, and for the one before."""
    strides = geometry.strides
    ends = strides * np.array([1, 2, 0]) - geometry.shift
    return geometry.multiplicity(ends[:, None] - np.arange(strides))


@functools.lru_cache(maxsize=64)
def fold_matrix(geometry: Geometry, planes: tuple[int, ...], rows: int, tokens: int, device: torch.device) -> Tensor:
    """[rows, tokens] float32: in the row of block j and plane p, `counts(geometry)[p]` at the tokens of the block."""
    strides = geometry.strides
    fold = torch.zeros(rows, tokens)
    of_block = torch.from_numpy(counts(geometry)[list(planes)])
    for block in range(tokens // strides):
        fold[block * len(planes) : (block + 1) * len(planes), block * strides : (block + 1) * strides] = of_block
    return fold.to(device)


def plan_call(
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ragged: Ragged,
    block: int,
    stride: int,
    causal: bool,
) -> RaggedPlan:
    """What the launches of one call share."""
    asked = {"masked": mask is not None, "causal": causal}
    sight = {"L": block, "D": stride, "CAUSAL": causal}
    return RaggedPlan(target, OP, TILES, asked, query, key, value, ragged, sight, mask)


def plan_blocks(
    plan: RaggedPlan,
    query: Tensor,
    key: Tensor,
    scale: float,
    lse: Tensor,
    geometry: Geometry,
    forced: Tensor | None,
    num_init: int,
    num_local: int,
    ids: Tensor,
) -> Iterator[Launch]:
    """Scores and best blocks, for one chunk of query tokens after the other, in the same memory."""
    strides = geometry.strides
    config = plan.config(SCORES)
    choose = plan.config(CHOOSE, count=ids.shape[2], strides=strides, forced=forced is not None)
    queries = config.tiles["BQ"]
    blocks = max(1, config.tiles["BN"] // strides)
    planes = tuple(plane for plane, own in enumerate(counts(geometry)) if plane == 0 or own.any())
    tokens, rows = plan.dot_tile(blocks * strides), plan.dot_tile(blocks * len(planes))
    most = int(plan.ragged.keys.max(initial=0))  # compressed tokens of a segment
    tiles = query_tiles(plan.ragged, queries, plan.device)
    chunk = max(1, min(len(tiles), CHUNK // (queries * plan.kv_heads)))
    n_rows = max(1, -(-most // (blocks * strides))) * blocks * len(planes)
    sums = torch.empty((chunk * plan.kv_heads, n_rows, queries), dtype=torch.float32, device=plan.device)
    fold = fold_matrix(geometry, planes, rows, tokens, plan.device)
    step = {"STEP": blocks * strides}
    constexprs = {
        "G": plan.group, **plan.sight, "HIDES": plan.mask is not None, "BQ": queries, "BN": tokens, **step,
        "ROWS": blocks * len(planes), "BF": rows, "DK": plan.key_dim, "BK": plan.dot_tile(plan.key_dim),
    }  # fmt: skip
    at_once = min(choose.tiles["BR"], queries)
    candidates = -(-most // strides)
    if num_local:
        candidates = max(candidates, -(-int(plan.ragged.queries.max(initial=0)) // geometry.select))
    choices = {
        **plan.sight, "M": strides, "BLOCK": geometry.select, "FORCES": forced is not None, "INIT": num_init,
        "LOCAL": num_local, "NEXT": 1 in planes, "BEFORE": 2 in planes, "K": ids.shape[2], **step, "BQ": queries,
        "BR": at_once, "BC": choose.tiles["BC"], "CHUNKED": candidates > choose.tiles["BC"],
        "BP": plan.target.tile(ids.shape[2]),
    }  # fmt: skip
    for first in range(0, len(tiles), chunk):
        items = min(chunk, len(tiles) - first) * plan.kv_heads
        now = {"n_items": items, "i_first": first, "n_rows": n_rows}
        arguments = {
            "q": query, "k": key, "mask": plan.masked(tiles), "lse": lse, "fold": fold, "tiles": tiles,
            "sums": sums, "scale": scale, **now, "N1": plan.heads, "N2": plan.kv_heads, "T": plan.tokens,
            **{name: plan.strides[name] for name in ("q_t", "q_h", "k_t", "k_n", "m_t")},
        }  # fmt: skip
        yield plan.launch(kernels.compress_attention_scores, items, arguments, constexprs, config, uses_cube=True)
        arguments = {
            "sums": sums, "forced": tiles if forced is None else forced, "tiles": tiles, "ids": ids, **now,
            "N2": plan.kv_heads, "t_t": 0 if forced is None else forced.stride(0),
        }  # fmt: skip
        parts = items * (queries // at_once)
        yield plan.launch(kernels.compress_attention_choose, parts, arguments, choices, choose)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None,
    topk_mask: Tensor | None,
    query_ends: tuple[int, ...],
    key_ends: tuple[int, ...],
    scale: float,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    select_block_count: int,
    causal: bool,
    num_init_blocks: int,
    num_local_blocks: int,
    importance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [T, N1, DV], ids [T, N2, K], maxima and sums [T, N1, 8]; the arguments are those of the operator."""
    target = target_of(query.device)
    ragged = Ragged(query_ends, key_ends)
    plan = plan_call(target, query, key, value, atten_mask, ragged, compress_block_size, compress_stride, causal)
    geometry = Geometry(compress_block_size, compress_stride, select_block_size, int(importance == "overlap"))
    out = query.new_empty((plan.tokens, plan.heads, plan.value_dim))
    ids = query.new_empty((plan.tokens, plan.kv_heads, select_block_count), dtype=torch.int32)
    softmax_max, softmax_sum = (
        query.new_empty((plan.tokens, plan.heads, STATE), dtype=torch.float32) for _ in range(2)
    )
    lse = query.new_empty((plan.heads, plan.tokens), dtype=torch.float32)
    # The kernels do not come to rows that are no segment's.
    end = query_ends[-1]
    out[end:], ids[end:], softmax_max[end:], softmax_sum[end:] = 0, -1, LOWEST, 0
    plan_attention(plan, query, key, value, scale, out, lse, (softmax_max, softmax_sum)).run(target, query.device)
    forced = (topk_mask, num_init_blocks, num_local_blocks)
    for launch in plan_blocks(plan, query, key, scale, lse, geometry, *forced, ids):
        launch.run(target, query.device)
    return out, ids, softmax_max, softmax_sum


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    atten_mask: Tensor | None,
    query_ends: tuple[int, ...],
    key_ends: tuple[int, ...],
    scale: float,
    compress_block_size: int,
    compress_stride: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, shaped like them; the arguments are those of the operator."""
    target = target_of(query.device)
    ragged = Ragged(query_ends, key_ends)
    plan = plan_call(target, query, key, value, atten_mask, ragged, compress_block_size, compress_stride, causal)
    return gradients(plan, grad, query, key, value, attention_out, (softmax_max, softmax_sum), scale)


def compile_plans(
    target: Target,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    compress_block_size: int,
    compress_stride: int,
    block: int,
    count: int,
    causal: bool,
    masked: bool,
    tokens: int = 4096,
) -> list[Launch]:
    """Every launch of the op for one shape, on meta tensors: what `nsa-triton compile` gives to the Ascend compiler."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    windows = (tokens - compress_block_size) // compress_stride + 1
    query, key = meta(tokens, heads, key_dim), meta(windows, kv_heads, key_dim)
    value, out = meta(windows, kv_heads, value_dim), meta(tokens, heads, value_dim)
    state, term = meta(tokens, heads, STATE, dtype=torch.float32), meta(heads, tokens, dtype=torch.float32)
    ids = meta(tokens, kv_heads, count, dtype=torch.int32)
    mask = meta(tokens, windows, dtype=torch.uint8) if masked else None
    forced = meta(tokens, windows, dtype=torch.uint8) if masked else None
    plan = plan_call(
        target, query, key, value, mask, Ragged((tokens,), (windows,)), compress_block_size, compress_stride, causal
    )
    geometry = Geometry(compress_block_size, compress_stride, block, 0)
    given = {"q": query, "k": key, "v": value, "g": out, "lse": term, "delta": term}
    num_forced = 0 if masked else 1
    return [
        plan_attention(plan, query, key, value, 1.0, out, term, (state, state)),
        *list(plan_blocks(plan, query, key, 1.0, term, geometry, forced, num_forced, num_forced, ids))[:2],
        plan_terms(plan, out, out, (state, state), term, term),
        plan_query_grad(plan, given, 1.0, query),
        *plan_key_grads(plan, given, 1.0, key, value),
    ]
