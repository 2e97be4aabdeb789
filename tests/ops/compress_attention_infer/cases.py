"""Data that the tests of compress_attention_infer share: implementations, problems, a second formula, judgement."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa_triton.ops._common.accuracy import judge
from nsa_triton.ops.compress_attention_infer import reference
from tests.implementations import each_implementation

every_impl = each_implementation("compress_attention_infer")


class Problem(NamedTuple):
    """The arguments of the registered operator, but for impl."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    lengths: Tensor
    rows: Tensor | None
    raw: Tensor | None
    scale: float
    window: int
    stride: int
    block: int
    entries: int  # K
    importance: str
    first_blocks: int | None = None  # num_init_blocks
    last_blocks: int | None = None  # num_local_blocks

    def doubled(self) -> Problem:
        return self._replace(query=self.query.double(), key=self.key.double(), value=self.value.double())

    def to(self, device):
        return Problem._make(part.to(device) if isinstance(part, Tensor) else part for part in self)

    def owned(self) -> list[tuple[int, int]]:
        """First row and number of the query tokens of each batch."""
        each = len(self.query) // len(self.lengths)
        even = [(b * each, each) for b in range(len(self.lengths))]
        return even if self.rows is None else [(first, count) for first, count in self.rows.tolist()]


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    page: int
    window: tuple[int, int]  # length and stride
    block: int
    entries: int  # K
    importance: str = "cann"


def make(
    sizes: Sizes,
    cached,
    tokens,
    dtype=torch.float32,
    seed=0,
    *,
    size=1.0,
    apart=None,
    hides=False,
    garbage=False,
    columns=None,
):
    """A problem of `tokens[b]` query tokens on `cached[b]` compressed tokens of each batch.

    What no query token may see is NaN: the rest of the last page, pages of no one, and rows of `query` that are no
    query token, if `apart` puts the batches that many rows apart. Unused entries of the block table, which has
    `columns`, are -1, or anything with `garbage`. With `hides`, the raw lengths are there.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, key_dim, value_dim, page, (window, stride), block, entries, importance = sizes
    batch = len(cached)
    columns = columns or max(1, *(-(-length // page) for length in cached)) + 1
    n_pages = sum(-(-length // page) for length in cached) + 2
    key, value = (torch.full((n_pages, page, kv_heads, dim), float("nan")) for dim in (key_dim, value_dim))
    table = rng.integers(-(2**31), 2**31 - 1, (batch, columns)) if garbage else np.full((batch, columns), -1)
    free = iter(rng.permutation(n_pages).tolist())
    for b, length in enumerate(cached):
        for column in range(-(-length // page)):
            table[b, column] = mine = next(free)
            used = min(page, length - column * page)
            key[mine, :used] = torch.randn(used, kv_heads, key_dim, generator=generator)
            value[mine, :used] = torch.randn(used, kv_heads, value_dim, generator=generator)
    firsts = [b * apart for b in range(batch)] if apart else np.cumsum([0, *tokens[:-1]]).tolist()
    query = torch.full((batch * apart if apart else sum(tokens), heads, key_dim), float("nan"))
    for first, mine in zip(firsts, tokens, strict=True):
        query[first : first + mine] = torch.randn(mine, heads, key_dim, generator=generator) * size
    even = not apart and len(set(tokens)) == 1
    rows = None if even else torch.tensor(list(zip(firsts, tokens, strict=True)), dtype=torch.int32)
    tails = rng.integers(0, min(stride, 4), batch)
    raw = [
        (length - 1) * stride + window + int(tail) if length else 5 for length, tail in zip(cached, tails, strict=True)
    ]
    return Problem(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        torch.from_numpy(table).int(),
        torch.tensor(cached, dtype=torch.int32),
        rows,
        torch.tensor(raw, dtype=torch.int32) if hides else None,
        key_dim**-0.5,
        window,
        stride,
        block,
        entries,
        importance,
    )


def multiplicity(window: int, stride: int, block: int, j: int, x: int, importance: str) -> int:
    """How often compressed token x counts for block j."""
    strides, reach = block // stride, window // stride
    if importance == "cann":
        return sum(x == strides * (j + 1) - a - b for a in range(strides) for b in range(reach))
    return len(set(range(x, x + reach)) & set(range(strides * j, strides * (j + 1))))


def _descending(score):
    return lambda j: (-score[j], j)


def naive(problem):
    """The operator once more, in other words than reference.py: token by token and block by block, in float64."""
    query, key, value, table, lengths, _, raw, scale, window, stride, block, entries, importance = problem.doubled()[
        :13
    ]
    page, kv_heads = key.shape[1:3]
    group, strides, reach = query.shape[1] // kv_heads, block // stride, window // stride
    output = torch.zeros(*query.shape[:2], value.shape[3], dtype=torch.float64)
    ids = torch.full((len(query), kv_heads, entries), -1, dtype=torch.int32)
    for b, (first, tokens) in enumerate(problem.owned()):
        n = int(lengths[b])
        if n == 0:
            continue
        places = [(int(table[b, i // page]), i % page) for i in range(n)]
        keys, values = (torch.stack([cache[place] for place in places], dim=1) for cache in (key, value))
        blocks = -(-((n - 1) * stride + window) // block)
        for t in range(tokens):
            last_token = (n - 1) * stride + window - 1  # of the newest window
            seen = n if raw is None or last_token <= int(raw[b]) - tokens + t else n - 1
            for head in range(kv_heads):
                score = [0.0] * blocks
                for h in range(head * group, (head + 1) * group):
                    weights = torch.softmax(keys[head, :seen] @ query[first + t, h] * scale, 0)
                    output[first + t, h] = weights @ values[head, :seen]
                    p = weights.tolist()
                    for j in range(blocks):
                        if importance == "cann":
                            terms = (strides * (j + 1) - a - c for a in range(strides) for c in range(reach))
                            score[j] += sum(p[x] for x in terms if 0 <= x < seen)
                        else:
                            near = range(max(0, strides * j - reach), min(seen, strides * (j + 1)))
                            score[j] += sum(multiplicity(window, stride, block, j, x, "overlap") * p[x] for x in near)
                forced = sorted({j for j in (0, blocks - 2, blocks - 1) if j >= 0})
                rest = sorted(set(range(blocks)) - set(forced), key=_descending(score))
                best = (forced + rest)[:entries]
                ids[first + t, head, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return output, ids


def call(function, problem, impl, **changes):
    """The public function on a problem without ragged rows; in layout BSND if the query has 4 dimensions."""
    query, key, value, table, lengths, _, raw, scale, window, stride, block, entries, importance = problem[:13]
    batched = query.dim() == 4
    return function(
        query,
        key,
        value,
        scale,
        query.shape[-2],
        key.shape[2],
        block,
        entries,
        key.shape[1],
        window,
        stride,
        **{
            "block_table": table,
            "atten_mask": None if raw is None else torch.ones(1),
            "layout": "BSND" if batched else "TND",
            "actual_seq_qlen": None if batched else [len(query) // len(lengths)] * len(lengths),
            "actual_cmp_seq_kvlen": lengths,
            "actual_sel_seq_kvlen": raw,
            "importance": importance,
            "num_init_blocks": problem.first_blocks,
            "num_local_blocks": problem.last_blocks,
            "impl": impl,
        }
        | changes,
    )


def assert_ids_right(ids: Tensor, problem: Problem, rtol: float = 1e-5) -> None:
    """The forced blocks come first, no block twice, and the score of each place is that of the reference's.

    Float32 sums in another order may exchange blocks whose scores differ by no more than their rounding; where scores
    are farther apart, ids of equal scores are equal ids.
    """
    exact = reference.scores(*_without_entries(problem.doubled()))
    rest = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for scores, (first, tokens) in zip(exact, problem.owned(), strict=True):
        own, blocks = ids[first : first + tokens].long(), scores.shape[-1]
        rest[first : first + tokens] = False
        expected = reference.best_blocks(scores, problem.entries).long()
        forced = len({j for j in (0, blocks - 2, blocks - 1) if j >= 0})
        assert torch.equal(own[..., :forced], expected[..., :forced])
        own, expected = own[..., : min(blocks, problem.entries)], expected[..., : min(blocks, problem.entries)]
        assert (ids[first : first + tokens, :, blocks:] == -1).all()
        assert ((own >= 0) & (own < blocks)).all()
        assert (own.sort(-1).values.diff(dim=-1) > 0).all(), "a block twice"
        found, wanted = (scores.gather(-1, some)[..., forced:] for some in (own, expected))
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-9)
    assert (ids[rest] == -1).all()


def assert_right(result: tuple[Tensor, Tensor], problem: Problem, rtol: float = 1e-5, slack: float = 1.0) -> None:
    """Output as accurate as eager PyTorch, or `slack` times less, and right ids."""
    output, ids = result
    expected, _ = reference.forward(*problem.doubled())
    eager, _ = reference.forward(*problem, precision=output.dtype)
    accuracy = judge(output, eager, expected, terms=problem.query.shape[2] + int(problem.lengths.max()))
    assert accuracy.rms_error <= slack * accuracy.limit, accuracy
    assert_ids_right(ids, problem, rtol)


def _without_entries(problem):
    parts = list(problem[:13])
    del parts[-2]
    return parts
