"""Data that the tests of select_attention_infer share: implementations, problems, a second formula, CANN's case."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa_triton.ops._common.accuracy import judge, relative_rms
from nsa_triton.ops.select_attention_infer import reference
from tests.implementations import each_implementation

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


def make(sizes: Sizes, cached, tokens, dtype=torch.float32, seed=0, *, size=1.0, stride=None, garbage=False) -> Problem:
    """A problem of `tokens[b]` query tokens on `cached[b]` tokens of each batch.

    What no query token may see is NaN: the rest of the last page, pages of no one, and rows of `query` that are no
    query token, if `stride` puts the batches that far apart. Lists of ids hold -1 anywhere, the same id twice and
    blocks that do not exist; unused entries of the block table are -1. With `garbage`, both are anything.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, key_dim, value_dim, page, block, entries = sizes
    batch = len(cached)
    columns = max(1, *(-(-length // page) for length in cached)) + int(rng.integers(2))
    n_pages = batch * columns + 2
    key, value = (torch.full((n_pages, page, kv_heads, dim), float("nan")) for dim in (key_dim, value_dim))
    table: Any = np.full((batch, columns), -1)
    if garbage:
        table = rng.integers(-(2**31), 2**31 - 1, table.shape)
    free = iter(rng.permutation(n_pages).tolist())
    for b, length in enumerate(cached):
        for column in range(-(-length // page)):
            mine = next(free)
            table[b, column] = mine
            used = min(page, length - column * page)
            key[mine, :used] = torch.randn(used, kv_heads, key_dim, generator=generator)
            value[mine, :used] = torch.randn(used, kv_heads, value_dim, generator=generator)
    firsts = [b * stride for b in range(batch)] if stride else np.cumsum([0, *tokens[:-1]]).tolist()
    total = batch * stride if stride else sum(tokens)
    query = torch.full((total, heads, key_dim), float("nan"))
    for first, count in zip(firsts, tokens, strict=True):
        query[first : first + count] = torch.randn(count, heads, key_dim, generator=generator) * size
    most = max(2, -(-max(cached) // block) + 2)
    ids = rng.integers(-1, most, (total, kv_heads, entries))
    ids[rng.random(ids.shape) < 0.2] = -1
    if garbage:
        ids = np.where(rng.random(ids.shape) < 0.4, rng.integers(-(2**31), 2**31 - 1, ids.shape), ids)
    even = not stride and len(set(tokens)) == 1
    rows = None if even else torch.tensor(list(zip(firsts, tokens, strict=True)), dtype=torch.int32)
    tensors = (query.to(dtype), key.to(dtype), value.to(dtype))
    indices = (torch.from_numpy(ids).int(), torch.from_numpy(table).int(), torch.tensor(cached, dtype=torch.int32))
    return Problem(*tensors, *indices, rows, key_dim**-0.5, block)


def naive(problem: Problem) -> tuple[Tensor, Tensor]:
    """The operator once more, in other words than reference.py: token by token and head by head, in float64."""
    query, key, value, ids, table, lengths, rows, scale, block = problem.doubled()
    total, heads, _ = query.shape
    group, page = heads // key.shape[2], key.shape[1]
    output = torch.zeros(total, heads, value.shape[3], dtype=torch.float64)
    lse = torch.full((total, heads), -math.inf, dtype=torch.float64)
    each = total // len(lengths)
    plan = [(b * each, each) for b in range(len(lengths))] if rows is None else rows.tolist()
    for b, (first, count) in enumerate(plan):
        for t in range(count):
            seen = int(lengths[b]) - (count - 1 - t)
            for h in range(heads):
                tokens: list[int] = []
                for i in ids[first + t, h // group].tolist():
                    if 0 <= i < 2**20:
                        tokens += range(i * block, min((i + 1) * block, seen))
                if not tokens:
                    continue
                places = [(int(table[b, p // page]), p % page) for p in tokens]
                keys = torch.stack([key[place][h // group] for place in places])
                values = torch.stack([value[place][h // group] for place in places])
                scores = keys @ query[first + t, h] * scale
                output[first + t, h] = torch.softmax(scores, 0) @ values
                lse[first + t, h] = torch.logsumexp(scores, 0)
    return output, lse


def assert_accurate(actual, problem: Problem) -> None:
    """As good as eager PyTorch, against the reference in float64. Matrix units take the probabilities in the dtype of
    the values, which costs as much again as rounding the output does; 2 x is then as close as random data tells."""
    output, lse = actual
    expected, expected_lse = reference.forward(*problem.doubled())
    assert output.dtype == problem.query.dtype
    assert lse.dtype == torch.float32
    terms = problem.query.shape[2] + problem.ids.shape[2] * problem.block
    rounded, exact_lse = reference.forward(*problem)
    eager, _ = reference.forward(*problem, precision=problem.query.dtype)
    assert judge(output, eager, expected, terms=terms).ok, judge(output, eager, expected, terms=terms)
    slack = math.sqrt(terms) * torch.finfo(torch.float32).eps
    assert relative_rms(output, expected) <= 2 * relative_rms(rounded, expected) + slack
    found = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), found)
    assert torch.equal(lse[~found], expected_lse[~found].float())
    limit = judge(lse[found], exact_lse[found], expected_lse[found], terms=terms)
    assert limit.ok, limit


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
