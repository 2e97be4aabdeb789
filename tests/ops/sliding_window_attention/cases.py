"""Data that the tests of sliding_window_attention share: implementations, problems, a second formula, and judges."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.accuracy import judge, relative_rms
from nsa_triton.ops.sliding_window_attention import reference
from tests.implementations import each_implementation

every_impl = each_implementation("sliding_window_attention")


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


class Problem(NamedTuple):
    """The arguments of the forward operator, but for impl."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]
    scale: float
    window: int

    def doubled(self) -> Problem:
        return self._replace(query=self.query.double(), key=self.key.double(), value=self.value.double())

    def to(self, device) -> Problem:
        parts: Any = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return Problem(*parts)


def ends_of(lengths) -> tuple[int, ...]:
    return tuple(accumulate(lengths))


def make(sizes: Sizes, queries, keys, window, dtype=torch.float32, seed=0, *, size=1.0, behind=0) -> Any:
    """A problem of segments of `queries[b]` query tokens and `keys[b]` keys. There are `behind` rows of NaN after the
    last segment, of queries and of keys."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, key_dim, value_dim = sizes

    def tokens(count, *shape):
        filled = torch.randn(count, *shape, generator=generator)
        return torch.cat((filled, torch.full((behind, *shape), float("nan")))).to(dtype)

    query = tokens(sum(queries), heads, key_dim) * size
    key, value = tokens(sum(keys), kv_heads, key_dim), tokens(sum(keys), kv_heads, value_dim)
    return Problem(query, key, value, ends_of(queries), ends_of(keys), key_dim**-0.5, window)


def random_grad(problem: Problem, seed=1) -> Tensor:
    """A gradient of the output."""
    shape = (*problem.query.shape[:2], problem.value.shape[2])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return grad.to(problem.query.dtype).to(problem.query.device)


def outputs_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """What the forward call gives to the gradient, by the reference."""
    output, lse = reference.forward(*problem)
    return output, lse.float()


def gradients_of(backward: Any, problem: Any, grad: Tensor, given: Any, **more: Any) -> Any:
    """Call a function with the arguments of the gradient operator; `given` are the output and the log-sum-exp."""
    return backward(grad, *problem[:3], *given, *problem[3:], **more)


def clean(problem: Problem) -> Any:
    """Without the NaN behind the last segment."""
    query, key, value = (tensor.nan_to_num() for tensor in problem[:3])
    return problem._replace(query=query, key=key, value=value)


def segments(problem: Problem) -> list[tuple[slice, slice]]:
    """The rows of query and of key of each segment."""
    pairs = (pairwise((0, *ends)) for ends in (problem.query_ends, problem.key_ends))
    return [(slice(*queries), slice(*keys)) for queries, keys in zip(*pairs, strict=True)]


def seen_by(problem: Problem) -> list[list[int]]:
    """The rows of key that each row of query sees, counted one by one from the end of the segment."""
    rows: list[list[int]] = [[] for _ in problem.query]
    for queries, keys in segments(problem):
        for behind, row in enumerate(range(queries.stop - 1, queries.start - 1, -1)):
            newest = keys.stop - 1 - behind
            rows[row] = list(range(newest, max(newest - problem.window, keys.start - 1), -1))
    return rows


def naive(problem: Problem) -> tuple[Tensor, Tensor]:
    """The operator once more, in other words than reference.py: dense softmax over all rows of key, in float64 and
    differentiable."""
    query, key, value, *_, scale, _ = problem.doubled()
    group = query.shape[1] // key.shape[1]
    seen = torch.zeros(len(query), len(key), dtype=torch.bool, device=query.device)
    for row, visible in enumerate(seen_by(problem)):
        seen[row, visible] = True
    k, v = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    scores = torch.einsum("thd,jhd->htj", query, k) * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    blind = ~seen.any(1)
    weights = torch.softmax(scores.masked_fill(blind[:, None], 0.0), -1) * ~blind[:, None]
    return torch.einsum("htj,jhd->thd", weights, v), torch.logsumexp(scores, -1).t()


def naive_gradients(problem: Problem, grad: Tensor) -> tuple[Tensor, ...]:
    """What autograd makes of the second formula."""
    doubled = problem.doubled()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in doubled[:3]]
    output = naive(doubled._replace(query=leaves[0], key=leaves[1], value=leaves[2]))[0]
    return torch.autograd.grad(output, leaves, grad.double(), materialize_grads=True)


def unseen(problem: Problem) -> tuple[Tensor, Tensor]:
    """Which rows of query see nothing, and which rows of key nobody sees."""
    rows = seen_by(problem)
    keys = torch.ones(len(problem.key), dtype=torch.bool)
    keys[[j for visible in rows for j in visible]] = False
    return torch.tensor([not visible for visible in rows]), keys


def last_bit(numbers: Tensor) -> float:
    """Of the largest, as float32."""
    return torch.finfo(torch.float32).eps * float(numbers.abs().max()) if numbers.numel() else 0.0


def assert_accurate(actual, problem: Problem) -> None:
    """As good as eager PyTorch, against the reference in float64. Matrix units take the probabilities in the dtype of
    the values, which costs as much again as rounding the output does; 2 x is then as close as random data tells."""
    output, lse = actual
    expected, expected_lse = reference.forward(*problem.doubled())
    assert output.dtype == problem.query.dtype
    assert lse.dtype == torch.float32
    terms = problem.query.shape[2] + min(problem.window, len(problem.key))
    rounded, exact_lse = reference.forward(*problem)
    eager = reference.forward(*problem, precision=problem.query.dtype)[0]
    accuracy = judge(output, eager, expected, terms=terms)
    assert accuracy.rms_error <= accuracy.limit, accuracy
    slack = math.sqrt(terms) * torch.finfo(torch.float32).eps
    assert relative_rms(output, expected) <= 2 * relative_rms(rounded, expected) + slack
    blind, _ = unseen(problem)
    assert not output[blind].any()
    assert (lse[blind] == -torch.inf).all()
    accuracy = judge(lse[~blind], exact_lse[~blind], expected_lse[~blind], terms=terms)
    assert accuracy.rms_error <= accuracy.limit, accuracy


def assert_gradients_accurate(actual, problem: Problem, grad: Tensor, given) -> None:
    """As good as eager PyTorch, against the reference in float64, all from the output and log-sum-exp `given`. Matrix
    units take dS and P in the dtype of the tensors. P is off by the last bit of the log-sum-exp."""
    doubled = [part.double() for part in given]
    expected = gradients_of(reference.backward, problem.doubled(), grad.double(), doubled)
    rounded = gradients_of(reference.backward, problem, grad, given)
    eager = gradients_of(reference.backward, problem, grad, given, precision=problem.query.dtype)
    blind, alone = unseen(problem)
    rows = grad.shape[0] * grad.shape[1] // problem.key.shape[1]
    dims = problem.query.shape[2] + problem.value.shape[2]
    eps = torch.finfo(torch.float32).eps
    bit = last_bit(given[1][~blind])
    names = ("query_grad", "key_grad", "value_grad")
    for name, one, low, once, truth, zero in zip(
        names, actual, eager, rounded, expected, (blind, alone, alone), strict=True
    ):
        terms = dims + (min(problem.window, len(problem.key)) if name == "query_grad" else rows)
        assert one.dtype == problem.query.dtype
        assert not one[zero].any(), name
        accuracy = judge(one, low, truth, terms=terms)
        assert accuracy.rms_error <= accuracy.limit + bit, (name, accuracy)
        slack = math.sqrt(terms) * eps + bit
        assert relative_rms(one, truth) <= 2 * relative_rms(once, truth) + slack, name
