"""Data that the tests of select_attention share: implementations, problems, a second formula, and judges."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.accuracy import judge, relative_rms
from nsa_triton.ops.select_attention import reference
from tests.implementations import each_implementation

LOWEST = torch.finfo(torch.float32).min


every_impl = each_implementation("select_attention")


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block: int
    entries: int  # K


class Problem(NamedTuple):
    """The arguments of the forward operator, but for impl."""

    query: Tensor
    key: Tensor
    value: Tensor
    ids: Tensor
    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]
    scale: float
    block: int
    causal: bool

    def doubled(self) -> Problem:
        return self._replace(query=self.query.double(), key=self.key.double(), value=self.value.double())

    def to(self, device) -> Problem:
        parts: Any = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return Problem(*parts)


def ends_of(lengths) -> tuple[int, ...]:
    return tuple(accumulate(lengths))


def make(
    sizes: Sizes,
    queries,
    keys,
    dtype=torch.float32,
    seed=0,
    *,
    causal=False,
    size=1.0,
    behind=0,
    garbage=False,
) -> Any:
    """A problem of segments of `queries[b]` query tokens and `keys[b]` key tokens.

    Lists of ids hold blocks in any order, the same block twice, -1 anywhere, and blocks that do not exist; with
    `garbage` also any other int32. There are `behind` rows of NaN after the last segment, of queries and of keys.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, key_dim, value_dim, block, entries = sizes

    def tokens(count, *shape):
        filled = torch.randn(count, *shape, generator=generator)
        return torch.cat((filled, torch.full((behind, *shape), float("nan")))).to(dtype)

    query = tokens(sum(queries), heads, key_dim) * size
    key, value = tokens(sum(keys), kv_heads, key_dim), tokens(sum(keys), kv_heads, value_dim)
    shape = (sum(queries) + behind, kv_heads, entries)
    blocks = torch.tensor([-(-length // block) for length in keys]).repeat_interleave(torch.tensor(queries))
    most = torch.cat((blocks, torch.ones(behind, dtype=torch.int64)))[:, None, None]
    ids = torch.randint(2**30, shape, generator=generator) % (most + 1)  # one of them is a block too far
    ids[torch.rand(shape, generator=generator) < 0.15] = -1
    if garbage:
        wild = torch.randint(-(2**31), 2**31, shape, generator=generator)
        ids = torch.where(torch.rand(shape, generator=generator) < 0.4, wild, ids)
    ends = (ends_of(queries), ends_of(keys))
    return Problem(query, key, value, ids.int(), *ends, key_dim**-0.5, block, causal)


def random_grad(problem: Problem, seed=1) -> Tensor:
    """A gradient of the output."""
    shape = (*problem.query.shape[:2], problem.value.shape[2])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return grad.to(problem.query.dtype).to(problem.query.device)


def statistics(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward call gives to the gradient, by the reference."""
    output, largest, total = reference.forward(*problem)
    return output, largest.float(), total.float()


def gradients_of(backward: Any, problem: Any, grad: Tensor, given: Any, **more: Any) -> Any:
    """Call a function with the arguments of the gradient operator; `given` are the output and the statistics."""
    return backward(grad, *problem[:3], *given, *problem[3:], **more)


def clean(problem: Problem) -> Any:
    """Without the NaN behind the last segment."""
    query, key, value = (tensor.nan_to_num() for tensor in problem[:3])
    return problem._replace(query=query, key=key, value=value)


def segments(problem: Problem) -> list[tuple[slice, slice]]:
    """The rows of query and of key of each segment."""
    pairs = (pairwise((0, *ends)) for ends in (problem.query_ends, problem.key_ends))
    return [(slice(*queries), slice(*keys)) for queries, keys in zip(*pairs, strict=True)]


def positions(ids: list[int], block: int, n_keys: int, token: int, causal: bool) -> list[int]:
    """The key tokens of a list of ids, one by one."""
    chosen = []
    for i in ids:
        for position in range(i * block, (i + 1) * block) if 0 <= i < 2**20 else ():
            if position < n_keys and (position <= token or not causal):
                chosen.append(position)
    return chosen


def naive(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The operator once more, in other words than reference.py: token by token and head by head, in float64, and
    differentiable."""
    query, key, value, ids, _, _, scale, block, causal = problem.doubled()
    tokens, heads, _ = query.shape
    group = heads // key.shape[1]
    rows = [[value.new_zeros(value.shape[2])] * heads for _ in range(tokens)]
    largest = torch.full((tokens, heads), LOWEST, dtype=torch.float64)
    total = torch.zeros(tokens, heads, dtype=torch.float64)
    for of_queries, of_keys in segments(problem):
        for t in range(of_queries.start, of_queries.stop):
            for h in range(heads):
                k, v = key[of_keys, h // group], value[of_keys, h // group]
                chosen = positions(ids[t, h // group].tolist(), block, len(k), t - of_queries.start, causal)
                if chosen:
                    scores = k[chosen] @ query[t, h] * scale
                    rows[t][h] = torch.softmax(scores, 0) @ v[chosen]
                    largest[t, h] = scores.detach().max()
                    total[t, h] = (scores.detach() - largest[t, h]).exp().sum()
    output = torch.stack([torch.stack(row) for row in rows])
    return output, largest[..., None].expand(-1, -1, 8), total[..., None].expand(-1, -1, 8)


def naive_gradients(problem: Problem, grad: Tensor) -> tuple[Tensor, ...]:
    """What autograd makes of the second formula."""
    doubled = problem.doubled()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in doubled[:3]]
    output = naive(doubled._replace(query=leaves[0], key=leaves[1], value=leaves[2]))[0]
    if not output.requires_grad:  # nothing is selected anywhere
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(output, leaves, grad.double(), materialize_grads=True)


def last_bit(numbers: Tensor) -> float:
    """Of the largest, as float32."""
    return torch.finfo(torch.float32).eps * float(numbers.abs().max()) if numbers.numel() else 0.0


def assert_accurate(actual, problem: Problem) -> None:
    """As good as eager PyTorch, against the reference in float64. Matrix units take the probabilities in the dtype of
    the values, which costs as much again as rounding the output does; 2 x is then as close as random data tells. Where
    an id is there twice, its logarithm is taken off a row's maximum: P is off by the last bit of that."""
    output, largest, total = actual
    expected, expected_largest, expected_total = reference.forward(*problem.doubled())
    assert output.dtype == problem.query.dtype
    assert largest.dtype == total.dtype == torch.float32
    terms = problem.query.shape[2] + problem.ids.shape[2] * problem.block
    rounded, exact_largest, exact_total = reference.forward(*problem)
    eager = reference.forward(*problem, precision=problem.query.dtype)[0]
    found = expected_total > 0
    bit = last_bit(expected_largest[found])
    accuracy = judge(output, eager, expected, terms=terms)
    assert accuracy.rms_error <= accuracy.limit + bit, accuracy
    slack = math.sqrt(terms) * torch.finfo(torch.float32).eps + bit
    assert relative_rms(output, expected) <= 2 * relative_rms(rounded, expected) + slack
    assert torch.equal(total > 0, found)
    assert (largest[~found] == LOWEST).all()
    assert not total[~found].any()
    assert not output[~found[..., 0]].any()
    for one, exact, truth in ((largest, exact_largest, expected_largest), (total, exact_total, expected_total)):
        accuracy = judge(one[found], exact[found], truth[found], terms=terms)
        assert accuracy.rms_error <= accuracy.limit + bit, accuracy
        assert torch.equal(one, one[..., :1].expand_as(one))


def assert_gradients_accurate(actual, problem: Problem, grad: Tensor, given) -> None:
    """As good as eager PyTorch, against the reference in float64, all from the output and statistics `given`. Matrix
    units take dS and P in the dtype of the tensors. The kernels take a row's maximum and the logarithm of its sum as
    one float32 number, and P is off by its last bit."""
    doubled = [part.double() for part in given]
    expected = gradients_of(reference.backward, problem.doubled(), grad.double(), doubled)
    rounded = gradients_of(reference.backward, problem, grad, given)
    eager = gradients_of(reference.backward, problem, grad, given, precision=problem.query.dtype)
    selected = problem.ids.shape[2] * problem.block
    rows = grad.shape[0] * grad.shape[1] // problem.key.shape[1]
    dims = problem.query.shape[2] + problem.value.shape[2]
    names = ("query_grad", "key_grad", "value_grad")
    unseen = (expected[2] == 0).all(-1)
    eps = torch.finfo(torch.float32).eps
    bit = last_bit((given[1] + given[2].log())[given[2] > 0])
    for name, one, zero in zip(names, actual, (given[2][..., 0] == 0, unseen, unseen), strict=True):
        assert not one[zero].any(), name
    for name, one, low, once, truth in zip(names, actual, eager, rounded, expected, strict=True):
        terms = dims + (selected if name == "query_grad" else rows)
        assert one.dtype == problem.query.dtype
        accuracy = judge(one, low, truth, terms=terms)
        assert accuracy.rms_error <= accuracy.limit + bit, (name, accuracy)
        slack = math.sqrt(terms) * eps + bit
        assert relative_rms(one, truth) <= 2 * relative_rms(once, truth) + slack, name


def assert_cann_close(actual: Tensor, golden: Tensor, precision: float = 1e-3) -> None:
    """op-plugin's assertRtolEqual: a few elements may miss a relative and an absolute bound."""
    difference = (actual.double() - golden.double()).abs()
    relative = difference / (torch.maximum(actual.double().abs(), golden.double().abs()) + 1e-10)
    allowed = difference.numel() * precision
    misses = (int((error >= precision).sum()) for error in (relative, difference))
    assert min(misses) <= allowed
