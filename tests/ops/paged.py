"""Problems of the ops that attend to a paged cache: their data, the formula in other words, and how exact is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa_triton.ops._common.accuracy import judge, relative_rms


class PagedOp(NamedTuple):
    """How the tests that these ops share reach one of them. A problem is its NamedTuple `Problem`."""

    name: str
    function: Callable[..., Any]  # the public one
    make: Callable[..., Any]  # a problem of sizes, cached tokens and query tokens
    own_arguments: Callable[[Any], dict[str, Any]]  # of a problem: what function takes and the other ops do not
    reference: Callable[..., tuple[Tensor, Tensor]]
    naive: Callable[[Any], tuple[Tensor, Tensor]]
    bad_number: dict[str, Any]  # an argument of the right type that is refused

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.nsa_triton, self.name).default

    def arguments(self, problem: Any, layout: str = "TND", *, folded: bool = False, **changes: Any) -> dict[str, Any]:
        """A problem as a public call; `layout` with a batch dimension wants equally many rows for each batch."""
        batch = len(problem.lengths)
        heads, kv_heads, page = problem.query.shape[1], problem.key.shape[2], problem.key.shape[1]
        call: dict[str, Any] = {
            "query": problem.query,
            "key": problem.key.flatten(2) if folded else problem.key,
            "value": problem.value.flatten(2) if folded else problem.value,
            "scale_value": problem.scale,
            "head_num": heads,
            "key_value_head_num": kv_heads,
            "page_block_size": page,
            "layout": layout,
            "block_table": problem.table,
            "actual_seq_qlen": None if problem.rows is None and layout != "TND" else qlens(problem),
            "actual_seq_kvlen": problem.lengths,
            "return_lse": True,
            "impl": "reference",
        } | self.own_arguments(problem)
        if layout != "TND":
            of_tokens = [name for name in ("query", "topk_indices") if name in call]
            call |= {name: call[name].unflatten(0, (batch, -1)) for name in of_tokens}
        if layout == "BSH":
            call["query"] = call["query"].flatten(2)
        return call | changes

    def __call__(self, problem: Any, layout: str = "TND", *, folded: bool = False, **changes: Any) -> Any:
        return self.function(**self.arguments(problem, layout, folded=folded, **changes))


def qlens(problem: Any) -> list[int]:
    batch = len(problem.lengths)
    return [len(problem.query) // batch] * batch if problem.rows is None else problem.rows[:, 1].tolist()


class Paged(NamedTuple):
    """What the problems of all these ops hold."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    lengths: Tensor
    rows: Tensor | None


def paged_tensors(
    sizes: Any, cached, tokens, dtype, seed, *, oldest: Sequence[int], size=1.0, stride=None, garbage=False
) -> Paged:
    """`tokens[b]` query tokens on `cached[b]` tokens of each batch, of which those from `oldest[b]` on may be seen.

    What no query token may see is NaN: other tokens, pages of no one, and rows of `query` that are no query token, if
    `stride` puts the batches that far apart. Pages without a token that may be seen have -1 in the block table, or
    anything with `garbage`.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, key_dim, value_dim, page = sizes[:5]
    batch = len(cached)
    columns = max(1, *(-(-length // page) for length in cached)) + int(rng.integers(2))
    n_pages = batch * columns + 2
    key, value = (torch.full((n_pages, page, kv_heads, dim), float("nan")) for dim in (key_dim, value_dim))
    table: Any = np.full((batch, columns), -1)
    if garbage:
        table = rng.integers(-(2**31), 2**31 - 1, table.shape)
    free = iter(rng.permutation(n_pages).tolist())
    for b, length in enumerate(cached):
        for column in range(oldest[b] // page, -(-length // page)):
            mine = next(free)
            table[b, column] = mine
            used = slice(max(0, oldest[b] - column * page), min(page, length - column * page))
            count = used.stop - used.start
            key[mine, used] = torch.randn(count, kv_heads, key_dim, generator=generator)
            value[mine, used] = torch.randn(count, kv_heads, value_dim, generator=generator)
    firsts = [b * stride for b in range(batch)] if stride else np.cumsum([0, *tokens[:-1]]).tolist()
    query = torch.full((batch * stride if stride else sum(tokens), heads, key_dim), float("nan"))
    for first, count in zip(firsts, tokens, strict=True):
        query[first : first + count] = torch.randn(count, heads, key_dim, generator=generator) * size
    even = not stride and len(set(tokens)) == 1
    rows = None if even else torch.tensor(list(zip(firsts, tokens, strict=True)), dtype=torch.int32)
    lengths = torch.tensor(cached, dtype=torch.int32)
    return Paged(query.to(dtype), key.to(dtype), value.to(dtype), torch.from_numpy(table).int(), lengths, rows)


def naive_attention(problem: Any, seen: Callable[[int, int, int], list[int]]) -> tuple[Tensor, Tensor]:
    """The ops once more, in other words than their references: token by token and head by head, in float64.

    `seen(row, visible, n)` lists the tokens that a row of the query sees with its kv head n, of the first `visible`.
    """
    query, key, value = problem.query.double(), problem.key.double(), problem.value.double()
    total, heads, _ = query.shape
    group, page = heads // key.shape[2], key.shape[1]
    output = torch.zeros(total, heads, value.shape[3], dtype=torch.float64)
    lse = torch.full((total, heads), -math.inf, dtype=torch.float64)
    each = total // len(problem.lengths)
    plan = [(b * each, each) for b in range(len(problem.lengths))] if problem.rows is None else problem.rows.tolist()
    for b, (first, count) in enumerate(plan):
        for t in range(count):
            visible = int(problem.lengths[b]) - (count - 1 - t)
            for h in range(heads):
                tokens = seen(first + t, visible, h // group)
                if not tokens:
                    continue
                places = [(int(problem.table[b, p // page]), p % page) for p in tokens]
                keys = torch.stack([key[place][h // group] for place in places])
                values = torch.stack([value[place][h // group] for place in places])
                scores = keys @ query[first + t, h] * problem.scale
                output[first + t, h] = torch.softmax(scores, 0) @ values
                lse[first + t, h] = torch.logsumexp(scores, 0)
    return output, lse


def assert_as_accurate_as_eager(actual: Any, problem: Any, reference: Callable[..., Any], terms: int) -> None:
    """As good as eager PyTorch, against the reference in float64. Matrix units take the probabilities in the dtype of
    the values, which costs as much again as rounding the output does; 2 x is then as close as random data tells."""
    output, lse = actual
    expected, expected_lse = reference(*problem.doubled())
    assert output.dtype == problem.query.dtype
    assert lse.dtype == torch.float32
    rounded, exact_lse = reference(*problem)
    eager, _ = reference(*problem, precision=problem.query.dtype)
    assert judge(output, eager, expected, terms=terms).ok, judge(output, eager, expected, terms=terms)
    slack = math.sqrt(terms) * torch.finfo(torch.float32).eps
    assert relative_rms(output, expected) <= 2 * relative_rms(rounded, expected) + slack
    found = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), found)
    assert torch.equal(lse[~found], expected_lse[~found].float())
    limit = judge(lse[found], exact_lse[found], expected_lse[found], terms=terms)
    assert limit.ok, limit
