"""The specification against second formulas, and CANN's own data on every implementation."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import pytest
import torch

from nsa_triton.ops.compress_attention import nsa_compress_attention, nsa_compress_attention_grad, reference
from tests.ops.compress.cases import assert_cann_close
from tests.ops.compress_attention.cases import (
    LOWEST,
    Problem,
    Sizes,
    assert_gradients_right,
    assert_ids_right,
    assert_right,
    call,
    call_grad,
    every_impl,
    gradient_of,
    make,
    naive,
    seen_by,
    true_gradients,
)

WINDOWS = [((32, 16), 64), ((16, 16), 16), ((64, 16), 64), ((48, 32), 96), ((64, 32), 128), ((48, 16), 80)]
BASE = Sizes(4, 2, 8, 6, (32, 16), 64, 4)
# What a call can say of visibility and of forced blocks; whether keys are the windows of the queries.
KINDS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"causal": True, "forced": (1, 2)}, True),
    ({"masked": True, "forced": "mask"}, False),
    ({"masked": True, "forced": (2, 0), "mask_dtype": torch.uint8, "behind": 3}, False),
    ({"causal": True, "forced": "mask", "behind": 2}, True),
]
kinds = pytest.mark.parametrize(("kind", "fitting"), KINDS, ids=lambda kind: str(kind))


@kinds
@pytest.mark.parametrize("importance", ["cann", "overlap"])
@pytest.mark.parametrize(("window", "block"), WINDOWS, ids=str)
def test_reference_is_the_naive_formula(window, block, importance, kind, fitting):
    sizes = Sizes(4, 2, 5, 7, window, block, 5, importance)
    problem = make(sizes, (0, 40, 1, 65), None if fitting else (5, 0, 3, 13), torch.float64, **kind)
    out, ids, *statistics = reference.forward(*problem)
    expected, expected_ids, *expected_statistics = naive(problem)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ids, expected_ids)
    for ours, exact in zip(statistics, expected_statistics, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, exact.float()) or torch.allclose(ours.double(), exact, rtol=1e-7, atol=0)


@kinds
@pytest.mark.parametrize("group", [1, 3])
def test_reference_gradient_is_that_of_autograd(group, kind, fitting):
    """Of PyTorch's own attention in float64, from an output and statistics in float64."""
    sizes = BASE._replace(heads=2 * group)
    problem = make(sizes, (0, 40, 1, 165), None if fitting else (5, 0, 3, 13), torch.float64, **kind)
    given = gradient_of(problem, naive(problem))
    for ours, exact in zip(reference.backward(*given), true_gradients(problem, given.grad), strict=True):
        assert exact.any()
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float32_and_probabilities_are_rounded(dtype):
    problem = make(BASE, (60, 30), (20, 9), dtype)
    out, _, *statistics = reference.forward(*problem)
    expected, _, *exact = reference.forward(*problem.doubled())
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=2 * eps + 1e-6)
    torch.testing.assert_close(statistics, exact, rtol=1e-5, atol=1e-5)
    if dtype == torch.bfloat16:  # the sum of rounded probabilities is not 1
        ones = problem._replace(value=torch.ones_like(problem.value)).segment(0)
        hidden = torch.zeros(60, 20, dtype=torch.bool)
        weights, _, _ = reference.probabilities(ones.query.float(), ones.key.float(), ones.scale, hidden)
        rounded = weights.to(dtype).float().sum(-1).flatten(1).to(dtype)
        assert torch.equal(reference.forward(*ones)[0][..., 0], rounded)


def test_statistics_stand_head_after_head_within_a_segment():
    problem = make(BASE, (3, 0, 5), (20, 4, 9), behind=2)
    _, _, softmax_max, softmax_sum = reference.forward(*problem)
    for b in (0, 2):
        first, tokens, _, _ = problem.segments()[b]
        alone = problem.segment(b)
        q, k = alone.query.unflatten(1, (2, 2)), alone.key
        s = torch.einsum("tngd,ind->ngti", q, k).flatten(0, 1) * problem.scale  # [N1, S1, S2]
        place = slice(first * 4 * 8, (first + tokens) * 4 * 8)
        found = (statistic.flatten()[place].view(4, tokens, 8) for statistic in (softmax_max, softmax_sum))
        expected = s.amax(-1), torch.exp(s - s.amax(-1, keepdim=True)).sum(-1)
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, exact.unsqueeze(-1).expand(ours.shape))
    assert (softmax_max[8:] == LOWEST).all()
    assert (softmax_sum[8:] == 0).all()


def test_packing_of_statistics_is_undone():
    values = torch.randn(11, 3)
    for ends in ((11,), (4, 4, 9), (0, 0), (0, 11), (1, 2, 11)):
        packed = reference.head_major(values, ends)
        assert packed.shape == (11, 3, 8)
        assert torch.equal(reference.query_major(packed, ends), values)


# --- acceptance data -------------------------------------------------------------------------------------------------


@functools.cache
def op_plugin_problem():
    generator = torch.Generator().manual_seed(0)
    shapes = (2633, 7, 8), (4072, 7, 8), (4072, 7, 7)
    query, key, value = (torch.randn(shape, generator=generator).half() for shape in shapes)
    topk_mask = torch.eye(1384, 567, dtype=torch.uint8)
    topk_mask[:, 0] = 1
    atten_mask = torch.triu(torch.ones(1384, 2266, dtype=torch.uint8), diagonal=1)
    masks = atten_mask, topk_mask
    return Problem(query, key, value, *masks, (1384, 2633), (2266, 4072), 0.3, 32, 16, 64, 16, False, 0, 0, "cann")


@functools.cache
def op_plugin_golden():
    """CANN's formula in float32: a penalty on what is masked, and a double sum of shifted probabilities."""
    problem = op_plugin_problem()
    outs, scores = [], []
    queries, keys = (list(pairwise((0, *ends))) for ends in (problem.query_ends, problem.key_ends))
    for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
        parts = problem.query[q0:q1], problem.key[k0:k1], problem.value[k0:k1]
        q, k, v = (part.float().transpose(0, 1) for part in parts)
        hidden = problem.atten_mask[: q1 - q0, : k1 - k0].float()
        p = torch.softmax(q @ k.mT * problem.scale - 40000.0 * hidden, -1)
        outs.append((p.half().float() @ v).transpose(0, 1))
        blocks = -(-(k1 - k0) // 4)
        longer = torch.nn.functional.pad(p, (1, 4))  # the token behind -1 .. blocks * 4
        score = torch.zeros(7, q1 - q0, blocks)
        for a in range(4):
            for b in range(2):
                at = torch.arange(1, blocks + 1) * 4 - a - b
                score += longer[..., at + 1]
        forced = problem.topk_mask[: q1 - q0, :blocks].bool()
        scores.append(score.masked_fill(forced, torch.inf).transpose(0, 1))
    return torch.cat(outs), scores


@every_impl
def test_op_plugin_data(impl):
    """One head to a group, head sizes 8 and 7, and masks of bytes."""
    problem = op_plugin_problem()
    golden, scores = op_plugin_golden()
    out, ids, softmax_max, softmax_sum = call(nsa_compress_attention, problem, impl, actual_sel_seq_kvlen=[567, 1019])
    assert_cann_close(out, golden)
    for score, (q0, q1) in zip(scores, pairwise((0, *problem.query_ends)), strict=True):
        own = ids[q0:q1].long()
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., :18]
        assert (own.unsqueeze(-1) == best.unsqueeze(-2)).any(-1).all(), "an id outside of the golden top K + 2"
        token = torch.arange(q1 - q0)
        seen = token < score.shape[-1]  # the block on the diagonal is forced, as far as there is one
        assert (own[..., 0] == 0).all()
        assert (own[1:, :, 1][seen[1:]] == token[1:][seen[1:], None]).all()
    assert_ids_right(ids, problem, rtol=1e-4)
    assert torch.equal(softmax_max, softmax_max[..., :1].expand(2633, 7, 8))
    assert (softmax_sum >= 1).all()


def documentation_problem(tokens: int) -> Problem:
    """That of the documentation, with so many of its 65536 query tokens, and a 16th of them compressed."""
    torch.manual_seed(0)
    query = torch.randn([tokens, 64, 192], dtype=torch.bfloat16)
    key = torch.randn([tokens // 16, 4, 192], dtype=torch.bfloat16)
    value = torch.randn([tokens // 16, 4, 128], dtype=torch.bfloat16)
    ends = (tokens,), (tokens // 16,)
    return Problem(query, key, value, None, None, *ends, 192**-0.5, 32, 16, 64, 16, False, 0, 0, "cann")


@every_impl
def test_documentation_example_made_smaller(impl):
    problem = documentation_problem(512)
    outputs = call(nsa_compress_attention, problem, impl, actual_sel_seq_kvlen=[8])
    assert [tuple(tensor.shape) for tensor in outputs] == [(512, 64, 128), (512, 4, 16), (512, 64, 8), (512, 64, 8)]
    assert (outputs[1][..., 8:] == -1).all()
    assert_right(outputs, problem)


@pytest.mark.slow
def test_documentation_example():
    """As printed. Its rows do not depend on one another: a few are compared."""
    problem = documentation_problem(65536)
    out, ids, softmax_max, softmax_sum = call(nsa_compress_attention, problem, "auto", actual_sel_seq_kvlen=[1024])
    some = torch.randperm(65536, generator=torch.Generator().manual_seed(1))[:64]
    few = problem._replace(query=problem.query[some], query_ends=(64,))
    flat = (statistic.view(64, 65536, 8)[:, some] for statistic in (softmax_max, softmax_sum))
    assert_right((out[some], ids[some], *(part.reshape(64, 64, 8) for part in flat)), few)


# --- the choice of blocks --------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("importance", ["cann", "overlap"])
def test_equal_scores_go_by_number(importance, impl):
    """Query 0: all tokens weigh the same, and so do all blocks that gather equally many."""
    problem = make(BASE._replace(entries=40, importance=importance), (9, 5), (130, 64))
    problem = problem._replace(query=torch.zeros_like(problem.query))
    _, ids, *_ = call(nsa_compress_attention, problem, impl)
    for (first, tokens, _, _), blocks in zip(problem.segments(), (33, 16), strict=True):
        # Those at an end that gather fewer: 4j - 1 .. 4j + 3 for "overlap", and for "cann" one token later.
        fewer = {("cann", 33): [32], ("cann", 16): [15], ("overlap", 33): [0, 32], ("overlap", 16): [0]}
        order = [j for j in range(blocks) if j not in fewer[importance, blocks]]
        expected = torch.tensor(order, dtype=torch.int32).expand(tokens, 2, -1)
        assert torch.equal(ids[first : first + tokens, :, : len(order)], expected)
        assert (ids[first : first + tokens, :, blocks:] == -1).all()
    assert_ids_right(ids, problem)


@every_impl
def test_blocks_that_nobody_sees_go_by_number(impl):
    """Causality leaves a token few blocks with a score: the list goes on with the others, future ones too."""
    problem = make(BASE._replace(entries=5), (400,), causal=True)
    _, ids, *_ = call(nsa_compress_attention, problem, impl)
    assert ids[0].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert_ids_right(ids, problem)
    for t in range(31, 64):  # windows 0 to 2, which are on block 0
        assert ids[t].tolist() == [[0, 1, 2, 3, 4]] * 2


@every_impl
@pytest.mark.parametrize(("initial", "local"), [(0, 0), (1, 0), (0, 1), (1, 2), (3, 4), (100, 100)])
def test_forced_blocks_come_first_by_number(initial, local, impl):
    problem = make(BASE._replace(entries=6), (400, 30, 130), causal=True, forced=(initial, local))
    _, ids, *_ = call(nsa_compress_attention, problem, impl)
    for first, tokens, _, keys in problem.segments():
        blocks = max(-(-keys // 4), -(-tokens // 64) if local else 0)  # every token is in one, if that is forced
        for t in range(tokens):
            own = t // 64
            forced = [j for j in range(blocks) if j < initial or own - local < j <= own]
            for row in ids[first + t].tolist():
                assert row[: len(forced)] == forced[:6]
                assert len({j for j in row if j >= 0}) == min(6, blocks)
    assert_ids_right(ids, problem)


@every_impl
def test_forced_blocks_are_a_mask(impl):
    """The numbers of initial and local blocks say what a mask could say too, where all tokens are in blocks of it."""
    numbers = make(BASE._replace(entries=6), (416, 120), causal=True, forced=(2, 3))
    block, own = torch.arange(7), torch.arange(416).unsqueeze(1) // 64
    mask = (block < 2) | ((own - 3 < block) & (block <= own))
    masked = numbers._replace(topk_mask=mask, initial=0, local=0)
    outputs = (call(nsa_compress_attention, problem, impl) for problem in (numbers, masked))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@every_impl
def test_causality_is_a_mask(impl):
    causal = make(BASE, (400, 0, 31, 130), causal=True)
    token, window = torch.arange(400).unsqueeze(1), torch.arange(24)
    masked = causal._replace(causal=False, atten_mask=window * 16 + 32 > token + 1)
    for one, other in zip(
        call(nsa_compress_attention, causal, impl), call(nsa_compress_attention, masked, impl), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    gradients = [call_grad(nsa_compress_attention_grad, gradient_of(p), impl) for p in (causal, masked)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_impl
@pytest.mark.parametrize("entries", [1, 2, 3, 9])
def test_more_blocks_than_there_are(entries, impl):
    problem = make(BASE._replace(entries=entries), (5, 5, 5, 5), (0, 1, 4, 5))
    _, ids, *_ = call(nsa_compress_attention, problem, impl)
    for (first, tokens, _, _), blocks in zip(problem.segments(), (0, 1, 1, 2), strict=True):
        own = ids[first : first + tokens]
        assert (own[..., blocks:] == -1).all()
        assert (own[..., :blocks] >= 0).all()
    assert_ids_right(ids, problem)


@every_impl
def test_nan_counts_as_no_score(impl):
    problem = make(BASE._replace(entries=12), (6, 4), (60, 60), forced=(1, 0))
    problem.query[0, 1] = float("nan")  # spoils its kv head, for one token
    out, ids, *_ = call(nsa_compress_attention, problem, impl)
    assert ids[0, 0].tolist() == list(range(12))
    assert out[0, 1].isnan().all()
    assert not out[0, [0, 2, 3]].isnan().any()
    assert not out[1:].isnan().any()
    clean = problem._replace(query=problem.query.nan_to_num(0.0))
    _, clean_ids, *_ = call(nsa_compress_attention, clean, impl)
    assert torch.equal(ids[1:], clean_ids[1:])
    assert torch.equal(ids[0, 1], clean_ids[0, 1])


# --- what nobody sees ------------------------------------------------------------------------------------------------


@every_impl
def test_tokens_that_see_nothing(impl):
    problem = make(BASE._replace(entries=3), (70, 3), (18, 0), masked=True, forced=(1, 0), behind=2)
    problem.atten_mask[5] = True
    outputs = call(nsa_compress_attention, problem, impl)
    out, ids, softmax_max, softmax_sum = outputs
    assert_right(outputs, problem)
    blind = [t for t in range(70) if not seen_by(problem, t, 18)]
    assert 5 in blind
    rows = [*blind, 70, 71, 72, 73, 74]
    assert not out[rows].any()
    assert ids[blind].tolist() == [[[0, 1, 2]] * 2] * len(blind)
    assert (ids[70:] == -1).all()
    for statistic, nothing in ((softmax_max, LOWEST), (softmax_sum, 0.0)):
        assert (statistic.flatten()[: 70 * 4 * 8].view(4, 70, 8)[:, blind] == nothing).all()
        assert (statistic[70:] == nothing).all()
    given = gradient_of(problem, outputs)
    gradients = call_grad(nsa_compress_attention_grad, given, impl)
    assert not gradients[0][rows].any()
    assert_gradients_right(gradients, given)


@every_impl
def test_a_segment_without_keys_or_without_queries(impl):
    for queries, keys in (((5, 3), (0, 0)), ((0, 0), (7, 2)), ((5, 0, 3, 0), (0, 7, 6, 0))):
        problem = make(BASE, queries, keys, behind=2)
        outputs = call(nsa_compress_attention, problem, impl)
        assert_right(outputs, problem)
        given = gradient_of(problem, outputs)
        assert_gradients_right(call_grad(nsa_compress_attention_grad, given, impl), given)


@every_impl
def test_no_keys_at_all(impl):
    problem = make(BASE, (31, 5), causal=True)
    assert problem.key.shape[0] == 0
    outputs = call(nsa_compress_attention, problem, impl)
    assert_right(outputs, problem)
    query_grad, key_grad, value_grad = call_grad(nsa_compress_attention_grad, gradient_of(problem, outputs), impl)
    assert not query_grad.any()
    assert (key_grad.shape, value_grad.shape) == ((0, 2, 8), (0, 2, 6))


@every_impl
def test_masks_may_be_larger_and_have_any_strides(impl):
    problem = make(BASE, (40, 33), (17, 9), masked=True, forced="mask", mask_dtype=torch.uint8)
    expected = call(nsa_compress_attention, problem, impl)
    masks = problem.atten_mask, problem.topk_mask
    tight = (masks[0][:40, :17].contiguous(), masks[1][:40, :5].contiguous())
    turned = tuple(mask.t().contiguous().t() for mask in masks)
    for atten_mask, topk_mask in (tight, turned, (masks[0] != 0, masks[1] != 0), (masks[0], masks[1] != 0)):
        other = problem._replace(atten_mask=atten_mask, topk_mask=topk_mask)
        actual = call(nsa_compress_attention, other, impl)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_impl
def test_block_lengths_are_ignored(impl):
    problem = make(BASE, (40, 33), (17, 9))
    expected = call(nsa_compress_attention, problem, impl)
    for lengths in ([5, 8], [3, 1], (7,), torch.tensor([9, 9, 9])):
        actual = call(nsa_compress_attention, problem, impl, actual_sel_seq_kvlen=lengths)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
