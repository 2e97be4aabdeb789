"""Data that the tests of sliding_window_attention_infer share: implementations, problems, a second formula."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa_triton.ops._common.accuracy import judge, relative_rms
from nsa_triton.ops.sliding_window_attention_infer import reference
from tests.implementations import each_implementation

every_impl = each_implementation("sliding_window_attention_infer")


class Problem(NamedTuple):
    """The arguments of the registered operator, but for impl."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    lengths: Tensor
    rows: Tensor | None
    scale: float
    window: int

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
    window: int


def make(sizes: Sizes, cached, tokens, dtype=torch.float32, seed=0, *, size=1.0, stride=None, garbage=False) -> Problem:
    """A problem of `tokens[b]` query tokens on `cached[b]` tokens of each batch.

    What no query token may see is NaN: tokens before the oldest window and behind the newest token, pages of no one,
    and rows of `query` that are no query token, if `stride` puts the batches that far apart. Pages that no window
    touches have -1 in the block table, or anything with `garbage`.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, key_dim, value_dim, page, window = sizes
    batch = len(cached)
    columns = max(1, *(-(-length // page) for length in cached)) + int(rng.integers(2))
    n_pages = batch * columns + 2
    key, value = (torch.full((n_pages, page, kv_heads, dim), float("nan")) for dim in (key_dim, value_dim))
    table: Any = np.full((batch, columns), -1)
    if garbage:
        table = rng.integers(-(2**31), 2**31 - 1, table.shape)
    free = iter(rng.permutation(n_pages).tolist())
    for b, length in enumerate(cached):
        oldest = max(0, length - max(tokens[b], 1) + 1 - window)
        for column in range(oldest // page, -(-length // page)):
            mine = next(free)
            table[b, column] = mine
            used = slice(max(0, oldest - column * page), min(page, length - column * page))
            count = used.stop - used.start
            key[mine, used] = torch.randn(count, kv_heads, key_dim, generator=generator)
            value[mine, used] = torch.randn(count, kv_heads, value_dim, generator=generator)
    firsts = [b * stride for b in range(batch)] if stride else np.cumsum([0, *tokens[:-1]]).tolist()
    total = batch * stride if stride else sum(tokens)
    query = torch.full((total, heads, key_dim), float("nan"))
    for first, count in zip(firsts, tokens, strict=True):
        query[first : first + count] = torch.randn(count, heads, key_dim, generator=generator) * size
    even = not stride and len(set(tokens)) == 1
    rows = None if even else torch.tensor(list(zip(firsts, tokens, strict=True)), dtype=torch.int32)
    tensors = (query.to(dtype), key.to(dtype), value.to(dtype))
    indices = (torch.from_numpy(table).int(), torch.tensor(cached, dtype=torch.int32))
    return Problem(*tensors, *indices, rows, key_dim**-0.5, window)


def naive(problem: Problem) -> tuple[Tensor, Tensor]:
    """The operator once more, in other words than reference.py: token by token and head by head, in float64."""
    query, key, value, table, lengths, rows, scale, window = problem.doubled()
    total, heads, _ = query.shape
    group, page = heads // key.shape[2], key.shape[1]
    output = torch.zeros(total, heads, value.shape[3], dtype=torch.float64)
    lse = torch.full((total, heads), -math.inf, dtype=torch.float64)
    each = total // len(lengths)
    plan = [(b * each, each) for b in range(len(lengths))] if rows is None else rows.tolist()
    for b, (first, count) in enumerate(plan):
        for t in range(count):
            own = int(lengths[b]) - count + t  # the position of the query token
            tokens = [p for p in range(own + 1) if own - window < p]
            if not tokens:
                continue
            places = [(int(table[b, p // page]), p % page) for p in tokens]
            for h in range(heads):
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
    terms = problem.query.shape[2] + problem.window
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
