"""Data that the tests of sliding_window_attention_infer share: implementations, problems, a second formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops.sliding_window_attention_infer import nsa_sliding_window_attention_infer, reference
from tests.implementations import each_implementation
from tests.ops.paged import PagedOp, assert_as_accurate_as_eager, naive_attention, paged_tensors

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


def make(sizes: Sizes, cached, tokens, dtype=torch.float32, seed=0, **more) -> Problem:
    """A problem of paged_tensors(), of tokens that the windows touch."""
    oldest = [max(0, end - max(count, 1) + 1 - sizes.window) for end, count in zip(cached, tokens, strict=True)]
    parts = paged_tensors(sizes, cached, tokens, dtype, seed, oldest=oldest, **more)
    return Problem(*parts, sizes.key_dim**-0.5, sizes.window)


def naive(problem: Problem) -> tuple[Tensor, Tensor]:
    return naive_attention(
        problem, lambda row, visible, n: [p for p in range(visible) if visible - 1 - problem.window < p]
    )


def assert_accurate(actual, problem: Problem) -> None:
    terms = problem.query.shape[2] + problem.window
    assert_as_accurate_as_eager(actual, problem, reference.forward, terms)


OP = PagedOp(
    "sliding_window_attention_infer",
    nsa_sliding_window_attention_infer,
    make,
    lambda problem: {"window_size": problem.window},
    reference.forward,
    naive,
    {"window_size": 0},
)
