"""Data that the tests of select_attention_infer share: implementations, problems, a second formula, CANN's case."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa_triton.ops.select_attention_infer import nsa_select_attention_infer, reference
from tests.implementations import each_implementation
from tests.ops.paged import PagedOp, assert_as_accurate_as_eager, naive_attention, paged_tensors

every_impl = each_implementation("select_attention_infer")


class Problem(NamedTuple):
    """The arguments of the registered operator, but for impl."""

    query: Tensor
    key: Tensor
    value: Tensor
    ids: Tensor
    table: Tensor
    lengths: Tensor
    rows: Tensor | None
    scale: float
    block: int

    def doubled(self) -> Problem:
        return self._replace(query=self.query.double(), key=self.key.double(), value=self.value.double())

    def to(self, device) -> Problem:
        parts: Any = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return Problem(*parts)


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    page: int
    block: int
    entries: int  # K


def make(sizes: Sizes, cached, tokens, dtype=torch.float32, seed=0, *, garbage=False, **more) -> Problem:
    """A problem of paged_tensors(). Lists of ids hold -1 anywhere, the same id twice and blocks that do not exist;
    with `garbage`, some are anything."""
    oldest = [0] * len(cached)
    parts = paged_tensors(sizes, cached, tokens, dtype, seed, oldest=oldest, garbage=garbage, **more)
    rng = np.random.default_rng(seed)
    most = max(2, -(-max(cached) // sizes.block) + 2)
    ids = rng.integers(-1, most, (len(parts.query), sizes.kv_heads, sizes.entries))
    ids[rng.random(ids.shape) < 0.2] = -1
    if garbage:
        ids = np.where(rng.random(ids.shape) < 0.4, rng.integers(-(2**31), 2**31 - 1, ids.shape), ids)
    return Problem(*parts[:3], torch.from_numpy(ids).int(), *parts[3:], sizes.key_dim**-0.5, sizes.block)


def naive(problem: Problem) -> tuple[Tensor, Tensor]:
    def seen(row, visible, n):
        tokens: list[int] = []
        for i in problem.ids[row, n].tolist():
            if 0 <= i < 2**20:
                tokens += range(i * problem.block, min((i + 1) * problem.block, visible))
        return tokens

    return naive_attention(problem, seen)


def assert_accurate(actual, problem: Problem) -> None:
    terms = problem.query.shape[2] + problem.ids.shape[2] * problem.block
    assert_as_accurate_as_eager(actual, problem, reference.forward, terms)


def own_arguments(problem: Problem) -> dict[str, Any]:
    count = problem.ids.shape[2]
    return {"topk_indices": problem.ids, "select_block_size": problem.block, "select_block_count": count}


OP = PagedOp(
    "select_attention_infer",
    nsa_select_attention_infer,
    make,
    own_arguments,
    reference.forward,
    naive,
    {"select_block_size": 24},
)


def assert_cann_close(actual: Tensor, golden: Tensor, precision: float = 1e-3) -> None:
    """op-plugin's assertRtolEqual for float16: a few elements may miss a relative and an absolute bound."""
    difference = (actual.double() - golden.double()).abs()
    relative = difference / (torch.maximum(actual.double().abs(), golden.double().abs()) + 1e-10)
    allowed = difference.numel() * precision
    misses = (int((error >= precision).sum()) for error in (relative, difference))
    assert min(misses) <= allowed


def op_plugin_data() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Query [123, 4, 192], caches of 246 pages, ids, block table and lengths as op-plugin's test draws them."""
    batch, page, block, count, kv_heads = 123, 64, 64, 2, 2
    lengths = [82] * batch
    state = np.random.RandomState(0)
    order = iter(state.permutation(246).tolist())
    table = torch.full((batch, 246 // batch), -1, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for column in range(-(-length // page)):
            table[b, column] = next(order)
    state = np.random.RandomState(1)
    ids = torch.full((batch, kv_heads, count), -1, dtype=torch.int32)
    for b, length in enumerate(lengths):
        blocks = -(-length // block)
        generator = torch.Generator().manual_seed(b)
        chosen = torch.randperm(blocks, generator=generator)[: max(1, state.randint(0, blocks))]
        ids[b, :, : len(chosen)] = chosen
    generator = torch.Generator().manual_seed(2)
    shapes = ((batch, 4, 192), (246, page, 384), (246, page, 256))
    query, key, value = (torch.randn(shape, generator=generator).half() for shape in shapes)
    return query, key, value, ids, table, lengths
