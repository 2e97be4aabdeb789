"""Data that the tests of compress_attention share: implementations, problems, a second formula, judgement."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.accuracy import judge
from nsa_triton.ops._common.block_scores import best_blocks
from nsa_triton.ops.compress_attention import reference
from tests.implementations import each_implementation

LOWEST = torch.finfo(torch.float32).min


every_impl = each_implementation("compress_attention")


class Problem(NamedTuple):
    """The arguments of the registered operator, but for impl."""

    query: Tensor
    key: Tensor
    value: Tensor
    atten_mask: Tensor | None
    topk_mask: Tensor | None
    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]
    scale: float
    window: int
    stride: int
    block: int
    entries: int  # K
    causal: bool
    initial: int
    local: int
    importance: str

    def doubled(self) -> Problem:
        return self._replace(query=self.query.double(), key=self.key.double(), value=self.value.double())

    def to(self, device) -> Problem:
        parts: Any = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return Problem(*parts)

    def bytes(self) -> Problem:
        """With masks as the library hands them to kernels."""
        masks = (self.atten_mask, self.topk_mask)
        atten_mask, topk_mask = (mask if mask is None else mask.view(torch.uint8) for mask in masks)
        return self._replace(atten_mask=atten_mask, topk_mask=topk_mask)

    def segments(self) -> list[tuple[int, int, int, int]]:
        """First query, query tokens, first key and keys of each segment."""
        queries, keys = (list(pairwise((0, *ends))) for ends in (self.query_ends, self.key_ends))
        return [(q, q_end - q, k, k_end - k) for (q, q_end), (k, k_end) in zip(queries, keys, strict=True)]

    def segment(self, b: int) -> Problem:
        """Segment b alone."""
        first, tokens, first_key, keys = self.segments()[b]
        return self._replace(
            query=self.query[first : first + tokens],
            key=self.key[first_key : first_key + keys],
            value=self.value[first_key : first_key + keys],
            query_ends=(tokens,),
            key_ends=(keys,),
        )


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: tuple[int, int]  # length and stride
    block: int
    entries: int  # K
    importance: str = "cann"


def windows(tokens: int, sizes: Sizes) -> int:
    """Complete windows of so many tokens."""
    length, stride = sizes.window
    return max(0, (tokens - length) // stride + 1)


def make(
    sizes: Sizes,
    queries,
    keys=None,
    dtype=torch.float32,
    seed=0,
    *,
    size=1.0,
    causal=False,
    masked=False,
    forced=None,
    behind=0,
    mask_dtype=torch.bool,
):
    """A problem of `queries[b]` query tokens on `keys[b]` compressed tokens of each segment: None, on their windows.

    `masked` draws an atten_mask that hides a third, and everything from some tokens; `forced` is "mask" for a topk_mask
    of a fifth of the blocks, or the numbers of initial and local blocks. Masks are larger than they need be, in each
    dimension, and what is not used of them hides and forces. `behind` rows of NaN follow the last segment.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, key_dim, value_dim, (window, stride), block, entries, importance = sizes
    keys = [windows(tokens, sizes) for tokens in queries] if keys is None else keys
    query_ends, key_ends = tuple(accumulate(queries)), tuple(accumulate(keys))
    shapes = (query_ends[-1], heads, key_dim), (key_ends[-1], kv_heads, key_dim), (key_ends[-1], kv_heads, value_dim)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    query, key, value = (
        torch.cat((tensor, tensor.new_full((behind, *tensor.shape[1:]), math.nan)))
        for tensor in (query * size, key, value)
    )
    blocks = -(-max(keys) // (block // stride))

    def mask(columns: int, share: float) -> Tensor:
        whole = torch.full((max(queries) + 2, columns + 3), 1, dtype=torch.uint8)
        drawn = torch.rand(max(queries), columns, generator=generator) < share
        whole[: max(queries), :columns] = drawn * torch.randint(1, 2 if mask_dtype == torch.bool else 256, drawn.shape)
        return whole.to(mask_dtype)

    atten_mask = mask(max(keys), 0.3) if masked else None
    if atten_mask is not None:
        atten_mask[::7] = 1
    topk_mask = mask(blocks, 0.2) if forced == "mask" else None
    initial, local = forced if isinstance(forced, tuple) else (0, 0)
    return Problem(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        atten_mask,
        topk_mask,
        query_ends,
        key_ends,
        key_dim**-0.5,
        window,
        stride,
        block,
        entries,
        causal,
        initial,
        local,
        importance,
    )


def multiplicity(problem: Problem, j: int, x: int) -> int:
    """How often compressed token x counts for block j."""
    strides, reach = problem.block // problem.stride, problem.window // problem.stride
    if problem.importance == "cann":
        return sum(x == strides * (j + 1) - a - b for a in range(strides) for b in range(reach))
    return len(set(range(x, x + reach)) & set(range(strides * j, strides * (j + 1))))


def seen_by(problem: Problem, t: int, keys: int) -> list[int]:
    """The compressed tokens that query token t of a segment sees."""
    if problem.atten_mask is not None:
        return [i for i, hidden in enumerate(problem.atten_mask[t].tolist()[:keys]) if not hidden]
    return [i for i in range(keys) if not problem.causal or i * problem.stride + problem.window <= t + 1]


def forced_for(problem: Problem, t: int, blocks: int) -> list[int]:
    if problem.topk_mask is not None:
        return [j for j, forced in enumerate(problem.topk_mask[t].tolist()[:blocks]) if forced]
    own = t // problem.block
    near = range(max(0, own - problem.local + 1), own + 1)  # none, if local is 0
    return sorted({*range(problem.initial), *near} & set(range(blocks)))


def naive(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator once more, in other words than reference.py: token by token and block by block, in float64."""
    query, key, value = problem.doubled()[:3]
    heads, kv_heads = query.shape[1], key.shape[1]
    group = heads // kv_heads
    out = torch.zeros(*query.shape[:2], value.shape[2], dtype=torch.float64)
    ids = torch.full((len(query), kv_heads, problem.entries), -1, dtype=torch.int32)
    flat_max = torch.full((query.shape[0] * heads * 8,), LOWEST, dtype=torch.float64)
    flat_sum = torch.zeros_like(flat_max)
    for first, tokens, first_key, keys in problem.segments():
        blocks = math.ceil(keys / (problem.block // problem.stride))
        if problem.local:
            blocks = max(blocks, math.ceil(tokens / problem.block))
        counts = torch.tensor(
            [[multiplicity(problem, j, x) for j in range(blocks)] for x in range(keys)], dtype=torch.float64
        ).view(keys, blocks)
        for t in range(tokens):
            seen = seen_by(problem, t, keys)
            rows = torch.tensor(seen, dtype=torch.long) + first_key
            for n in range(kv_heads):
                score = torch.zeros(blocks, dtype=torch.float64)
                for h in range(n * group, (n + 1) * group) if seen else ():
                    s = key[rows, n] @ query[first + t, h] * problem.scale
                    weights = torch.softmax(s, 0)
                    out[first + t, h] = weights @ value[rows, n]
                    place = ((first * heads + h * tokens) + t) * 8
                    flat_max[place : place + 8] = s.max()
                    flat_sum[place : place + 8] = torch.exp(s - s.max()).sum()
                    score += weights @ counts[seen]
                forced = forced_for(problem, t, blocks)
                rest = sorted(set(range(blocks)) - set(forced), key=lambda j: (-score[j].item(), j))
                best = (forced + rest)[: problem.entries]
                ids[first + t, n, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return out, ids, flat_max.view(*query.shape[:2], 8), flat_sum.view(*query.shape[:2], 8)


def attended(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The output of other tensors in float64, for autograd: scaled_dot_product_attention, segment by segment."""
    group = query.shape[1] // key.shape[1]
    parts = []
    for first, tokens, first_key, keys in problem.segments():
        q = query[first : first + tokens].transpose(0, 1)
        k, v = (part[first_key : first_key + keys].transpose(0, 1).repeat_interleave(group, 0) for part in (key, value))
        seen = torch.zeros(tokens, keys, dtype=torch.bool)
        for t in range(tokens):
            seen[t, seen_by(problem, t, keys)] = True
        blind = ~seen.any(1)
        seen[blind] = True  # any finite number: they are left out below
        if keys == 0 or tokens == 0:
            parts.append(q.new_zeros(tokens, query.shape[1], value.shape[2]))
            continue
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=problem.scale)
        parts.append(out.masked_fill(blind[:, None], 0.0).transpose(0, 1))
    parts.append(query.new_zeros(len(query) - problem.query_ends[-1], query.shape[1], value.shape[2]))
    return torch.cat(parts)


def true_gradients(problem: Problem, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [tensor.double().nan_to_num(0.0).requires_grad_() for tensor in problem[:3]]
    out = attended(problem, *leaves)
    return torch.autograd.grad(out, leaves, grad.double().nan_to_num(0.0), materialize_grads=True)  # type: ignore[return-value]


class GradProblem(NamedTuple):
    """The arguments of the registered gradient, but for impl."""

    grad: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    attention_out: Tensor
    softmax_max: Tensor
    softmax_sum: Tensor
    atten_mask: Tensor | None
    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]
    scale: float
    window: int
    stride: int
    causal: bool

    def doubled(self) -> GradProblem:
        parts = {name: getattr(self, name).double() for name in ("grad", "query", "key", "value", "attention_out")}
        return self._replace(**parts)


def gradient_of(problem: Problem, outputs=None, seed=0):
    """The gradient of a problem for a random gradient of its output; of the exact outputs, unless others are given."""
    if outputs is None:
        out, _, *statistics = reference.forward(*problem.doubled())
        outputs = (out.to(problem.query.dtype), None, *statistics)
    out, _, softmax_max, softmax_sum = outputs
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator).to(out)
    grad[problem.query_ends[-1] :] = math.nan
    shared: Any = (problem.atten_mask, *problem[5:10], problem.causal)
    return GradProblem(grad, *problem[:3], out, softmax_max, softmax_sum, *shared)


def call(function, problem: Problem, impl: str, **changes):
    """The public function on a problem."""
    return function(
        problem.query,
        problem.key,
        problem.value,
        problem.scale,
        problem.query.shape[1],
        problem.window,
        problem.stride,
        problem.block,
        problem.entries,
        **{
            "atten_mask": problem.atten_mask,
            "topk_mask": problem.topk_mask,
            "actual_seq_qlen": problem.query_ends,
            "actual_cmp_seq_kvlen": problem.key_ends,
            "causal": problem.causal,
            "num_init_blocks": problem.initial,
            "num_local_blocks": problem.local,
            "importance": problem.importance,
            "impl": impl,
        }
        | changes,
    )


def call_grad(function, problem: GradProblem, impl: str, **changes):
    """The public gradient on a problem."""
    return function(
        *problem[:7],
        problem.scale,
        problem.query.shape[1],
        problem.window,
        problem.stride,
        **{
            "atten_mask": problem.atten_mask,
            "actual_seq_qlen": problem.query_ends,
            "actual_cmp_seq_kvlen": problem.key_ends,
            "causal": problem.causal,
            "impl": impl,
        }
        | changes,
    )


def scores_of(problem: Problem) -> list[Tensor]:
    """The exact scores [S1, N2, nb] of each segment."""
    exact = problem.doubled()
    shared = (exact.atten_mask, *exact[5:11], exact.causal, exact.importance, exact.local)
    return reference.scores(exact.query, exact.key, *shared)


def assert_ids_right(ids: Tensor, problem: Problem, rtol: float = 1e-5) -> None:
    """The forced blocks come first, no block twice, and the score of each place is that of the reference's.

    Float32 sums in another order may exchange blocks whose scores differ by no more than their rounding; where scores
    are farther apart, ids of equal scores are equal ids. Blocks of score 0 go by number exactly.
    """
    assert ids.dtype == torch.int32
    assert (ids[problem.query_ends[-1] :] == -1).all()
    for scores, (first, tokens, _, _) in zip(scores_of(problem), problem.segments(), strict=True):
        blocks = scores.shape[-1]
        own, chosen = ids[first : first + tokens].long(), min(blocks, problem.entries)
        assert (own[..., chosen:] == -1).all()
        own = own[..., :chosen]
        forced = torch.zeros(tokens, blocks, dtype=torch.bool)
        for t in range(tokens):
            forced[t, forced_for(problem, t, blocks)] = True
        forced = forced[:, None].to(scores.device)
        expected = best_blocks(scores, forced, problem.entries)[..., :chosen].long()
        assert ((own >= 0) & (own < blocks)).all()
        assert (own.sort(-1).values.diff(dim=-1) > 0).all(), "a block twice"
        found, wanted = (scores.gather(-1, some) for some in (own, expected))
        is_forced = torch.arange(chosen, device=own.device) < forced.sum(-1, keepdim=True)
        none_is_tiny = ((scores == 0) | (scores > 1e-30)).all(-1, keepdim=True)
        exact = is_forced | (none_is_tiny & (wanted == 0))
        assert torch.equal(own.where(exact, -1), expected.where(exact, -1))
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-9)


def assert_statistics_right(statistics, expected, rtol: float = 1e-5) -> None:
    """m and z in float32: m as far as sums of products are exact, and z as exact as its exponents are."""
    for ours, exact in zip(statistics, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, ours[..., :1].expand(ours.shape))
        nothing = expected[1] == 0
        assert torch.equal(ours[nothing], exact[nothing].float())
        torch.testing.assert_close(ours[~nothing].double(), exact[~nothing].double(), rtol=rtol, atol=rtol)


def assert_right(outputs, problem: Problem, rtol: float = 1e-5, slack: float = 1.0) -> None:
    """The output as accurate as eager PyTorch, or `slack` times less, and right ids and statistics."""
    out, ids, *statistics = outputs
    expected, _, *exact = reference.forward(*problem.doubled())
    eager, *_ = reference.forward(*problem, precision=problem.query.dtype)
    assert out.dtype == problem.query.dtype
    accuracy = judge(out, eager, expected, terms=problem.query.shape[2] + max(problem.key_ends[-1], 1))
    assert accuracy.rms_error <= slack * accuracy.limit, accuracy
    assert not out[problem.query_ends[-1] :].any()
    assert_ids_right(ids, problem, rtol)
    assert_statistics_right(statistics, exact, rtol)


def assert_gradients_right(gradients, problem: GradProblem, slack: float = 1.0) -> None:
    """Each as accurate as eager PyTorch, or `slack` times less, from the same outputs and statistics."""
    expected = reference.backward(*problem.doubled())
    eager = reference.backward(*problem, precision=problem.query.dtype)
    group = problem.query.shape[1] // problem.key.shape[1]
    sums = (len(problem.key), len(problem.query) * group, len(problem.query) * group)
    for name, ours, theirs, exact, terms in zip("qkv", gradients, eager, expected, sums, strict=True):
        assert ours.dtype == exact.to(problem.query.dtype).dtype
        assert ours.shape == exact.shape
        if not exact.any():  # rows that see one token: differences of equal numbers, of which a last bit may be left
            largest = max(float(part.nan_to_num().abs().max()) for part in problem[:4] if part.numel()) ** 3
            assert float(ours.abs().max()) <= torch.finfo(torch.float32).eps * terms * largest, name
            continue
        accuracy = judge(ours, theirs, exact, terms=problem.query.shape[2] + terms)
        assert accuracy.rms_error <= slack * accuracy.limit, (name, accuracy)
    assert not gradients[0][problem.query_ends[-1] :].any()
    assert not any(gradient[problem.key_ends[-1] :].any() for gradient in gradients[1:])
