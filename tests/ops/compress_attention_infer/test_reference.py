"""The specification against a second formula, and CANN's own data on every implementation."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ops._common.block_scores import block_importance
from nsa_triton.ops.compress_attention_infer import nsa_compress_attention_infer, reference
from tests.ops.compress.cases import assert_cann_close
from tests.ops.compress_attention_infer.cases import (
    Problem,
    Sizes,
    assert_ids_right,
    assert_right,
    call,
    every_impl,
    make,
    multiplicity,
    naive,
)

BASE = Sizes(4, 2, 8, 6, 16, (32, 16), 64, 4)
WINDOWS = [
    ((32, 16), 64),
    ((16, 16), 16),
    ((48, 16), 48),
    ((64, 32), 128),
    ((32, 32), 96),
    ((48, 16), 80),
    ((48, 32), 64),
]


@pytest.mark.parametrize("importance", ["cann", "overlap"])
@pytest.mark.parametrize(("window", "block"), WINDOWS, ids=str)
def test_reference_is_the_naive_formula(window, block, importance):
    sizes = Sizes(4, 2, 5, 7, 16, window, block, 6, importance)
    for hides, tokens, apart in (
        (False, (1, 1, 1, 1, 1), None),
        (True, (2, 1, 4, 3, 0), None),
        (True, (1, 3, 2, 4, 0), 4),
    ):
        problem = make(sizes, (0, 1, 16, 33, 50), tokens, torch.float64, apart=apart, hides=hides)
        output, ids = reference.forward(*problem)
        expected, expected_ids = naive(problem)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("importance", ["cann", "overlap"])
@pytest.mark.parametrize(("window", "block"), WINDOWS, ids=str)
def test_importance_counts_each_token_as_often_as_the_double_sum(window, block, importance):
    n, (length, stride) = 23, window
    blocks = reference.candidates(n, length, stride, block)
    counts = block_importance(torch.eye(n), blocks, block // stride, length // stride, importance)
    expected = [[multiplicity(length, stride, block, j, x, importance) for j in range(blocks)] for x in range(n)]
    assert counts.tolist() == expected


def test_multiplicities_that_the_specification_prints():
    def counts(strides, reach, j):
        columns = block_importance(torch.eye(40), 8, strides, reach, "cann")[:, j]
        return {x: int(count) for x, count in enumerate(columns) if count}

    assert counts(4, 2, 3) == {16: 1, 15: 2, 14: 2, 13: 2, 12: 1}
    assert counts(2, 1, 3) == {7: 1, 8: 1}
    assert counts(1, 1, 3) == {4: 1}
    assert not block_importance(torch.eye(40), 8, 3, 1, "cann")[0].any()  # NN = 1: P[0] is never counted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float32_and_probabilities_are_rounded(dtype):
    problem = make(Sizes(4, 2, 16, 8, 16, (32, 16), 64, 4), (60, 9), (1, 1), dtype)
    output, _ = reference.forward(*problem)
    expected, _ = reference.forward(*problem.doubled())
    eps = torch.finfo(dtype).eps
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=eps, atol=2 * eps + 1e-6)
    if dtype == torch.bfloat16:  # the sum of rounded probabilities is not 1
        ones = problem._replace(value=torch.ones_like(problem.value))
        weights = reference.probabilities(
            problem.query[:1].float(), keys_of(problem), problem.scale, torch.zeros(1) > 0
        )
        assert torch.equal(reference.forward(*ones)[0][0, :, 0], weights.to(dtype).float().sum(-1).flatten().to(dtype))


def keys_of(problem: Problem) -> torch.Tensor:
    """The keys of batch 0 in float32."""
    return problem.key[problem.table[0, :4].long()].flatten(0, 1)[:60].float()


# --- acceptance data -------------------------------------------------------------------------------------------------

VENDOR_TABLE = [23, 2, 20, 22, 4, 21, 7, 12, 3, 20, 20, 0, 15, 0, 4, 8, 10, 20, 21, 18, 18, 18, 11, 12, 20]


def vendor_problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator).half() for shape in ((1, 32, 65), (25, 48, 1, 65), (25, 48, 1, 18))
    )
    table, lengths = torch.tensor([VENDOR_TABLE], dtype=torch.int32), torch.tensor([1180], dtype=torch.int32)
    return Problem(query, key, value, table, lengths, None, None, 0.01, 32, 16, 32, 397, "cann")


@every_impl
@pytest.mark.parametrize("layout", ["TND", "BSND"])
def test_op_plugin_data(layout, impl):
    """A page stands in the block table up to four times: blocks tie exactly, and go by their number."""
    problem = vendor_problem()
    golden, golden_ids = naive(problem)
    query = problem.query if layout == "TND" else problem.query[None]
    output, ids = nsa_compress_attention_infer(
        query,
        problem.key[:, :, 0],
        problem.value[:, :, 0],
        0.01,
        32,
        1,
        32,
        397,
        48,
        32,
        16,
        layout=layout,
        block_table=problem.table,
        actual_cmp_seq_kvlen=[1180],
        impl=impl,
    )
    assert output.shape == ((1, 32, 18) if layout == "TND" else (1, 1, 32, 18))
    assert ids.shape == ((1, 1, 397) if layout == "TND" else (1, 1, 1, 397))
    assert_cann_close(output.view(golden.shape), golden)
    assert_ids_right(ids.view(golden_ids.shape), problem)
    assert len(set(ids.flatten().tolist()) - set(golden_ids.flatten().tolist())) <= 2


@every_impl
def test_documentation_example(impl):
    """As printed: the block table is made, and not passed."""
    torch.manual_seed(0)
    query = torch.randn([20, 8, 192], dtype=torch.bfloat16)
    key = torch.randn([160, 128, 384], dtype=torch.bfloat16)
    value = torch.randn([160, 128, 256], dtype=torch.bfloat16)
    actual_cmp_seq_kvlen = [1024] * 20
    output, ids = nsa_compress_attention_infer(
        query, key, value, 1.0, 8, 2, 64, 16, 128, 32, 16, actual_cmp_seq_kvlen=actual_cmp_seq_kvlen, impl=impl
    )
    assert output.shape == (20, 8, 128)
    assert ids.shape == (20, 2, 16)
    table, lengths = torch.arange(160).view(20, 8).int(), torch.tensor(actual_cmp_seq_kvlen, dtype=torch.int32)
    caches = key.view(160, 128, 2, 192), value.view(160, 128, 2, 128)
    problem = Problem(query, *caches, table, lengths, None, None, 1.0, 32, 16, 64, 16, "cann")
    golden, _ = naive(problem)
    torch.testing.assert_close(output.double(), golden, rtol=2**-7, atol=2**-6)
    assert_right((output, ids), problem, rtol=1e-4)


# --- the choice of blocks --------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("cached", [0, 1, 2, 3, 4, 7, 8, 30])
def test_forced_blocks_come_first_and_missing_ones_last(cached, count, impl):
    problem = make(Sizes(2, 1, 8, 8, 32, (32, 16), 32, count), (cached,), (1,), columns=1)
    _, ids = call(nsa_compress_attention_infer, problem, impl)
    blocks = -(-((cached - 1) * 16 + 32) // 32) if cached else 0
    forced = sorted({0, blocks - 2, blocks - 1} & set(range(blocks)))
    assert ids[0, 0, : len(forced)].tolist() == forced[:count]
    assert ids[0, 0, blocks:].tolist() == [-1] * max(0, count - blocks)
    assert set(ids[0, 0, :blocks].tolist()) <= set(range(blocks))
    assert_ids_right(ids, problem)


@every_impl
@pytest.mark.parametrize("importance", ["cann", "overlap"])
def test_equal_scores_go_by_number(importance, impl):
    """Query 0: all tokens weigh the same, and so do all blocks that gather equally many."""
    problem = make(Sizes(4, 2, 8, 8, 16, (32, 16), 64, 40, importance), (130, 64), (1, 1))
    problem = problem._replace(query=torch.zeros_like(problem.query))
    _, ids = call(nsa_compress_attention_infer, problem, impl)
    for b, blocks in enumerate((33, 17)):
        whole = list(range(1, blocks - 2))
        expected = [0, blocks - 2, blocks - 1, *whole] + [-1] * (40 - blocks)
        assert ids[b].tolist() == [expected] * 2


@every_impl
@pytest.mark.parametrize("page", [16, 48])
def test_repeated_pages_tie(page, impl):
    """One page throughout: the blocks repeat with it, and each class of equal ones goes by number."""
    problem = make(Sizes(2, 1, 8, 8, page, (32, 16), 32, 30), (page * 6,), (1,))
    problem = problem._replace(
        table=torch.zeros(1, 6, dtype=torch.int32), key=problem.key[:1].nan_to_num(0.3), value=problem.value[:1]
    )
    _, ids = call(nsa_compress_attention_infer, problem, impl)
    period, blocks = page // 2, page * 3 + 1
    places = ids[0, 0, 3:].tolist()
    for known in (place for place in places if 1 <= place < blocks - 2 - period):
        if known + period in places:
            assert places.index(known) < places.index(known + period)
        else:  # cut off by K: then nothing with a lower score is there either
            assert known in places


@every_impl
def test_nan_counts_as_no_score(impl):
    problem = make(BASE._replace(entries=12), (60, 60), (1, 1), columns=4)
    problem.query[0, 1] = float("nan")  # spoils its kv head, in one batch
    output, ids = call(nsa_compress_attention_infer, problem, impl)
    assert ids[0, 0].tolist() == [0, 14, 15, *range(1, 10)]
    assert output[0, 1].isnan().all()
    assert not output[0, [0, 2, 3]].isnan().any()
    assert not output[1].isnan().any()
    clean = problem._replace(query=problem.query.nan_to_num(0.0))
    assert torch.equal(ids[1], call(nsa_compress_attention_infer, clean, impl)[1][1])
    assert torch.equal(ids[0, 1], call(nsa_compress_attention_infer, clean, impl)[1][0, 1])


# --- several query tokens --------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("tokens", [2, 4])
def test_early_query_tokens_do_not_see_the_newest_window(tokens, impl):
    for tail in range(6):
        problem = make(BASE, (35,), (tokens,), seed=tail, columns=4)
        raw = 34 * 16 + 32 + tail
        hiding = problem._replace(raw=torch.tensor([raw], dtype=torch.int32))
        output, ids = call(nsa_compress_attention_infer, hiding, impl)
        open_output, _ = call(nsa_compress_attention_infer, problem, impl)
        expected, expected_ids = naive(hiding)
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
        assert_ids_right(ids, hiding)
        assert torch.equal(expected_ids[:, :, :3], ids[:, :, :3])
        for t in range(tokens):
            hidden = tokens - 1 - t > tail
            assert torch.allclose(output[t], open_output[t], atol=1e-6) == (not hidden)


@every_impl
def test_what_switches_the_rule_on(impl):
    """Several query tokens, a mask and raw lengths: without any one of them, everything is visible."""
    problem = make(BASE, (35, 20, 3), (3, 3, 3), columns=4)
    problem = problem._replace(raw=torch.tensor([34 * 16 + 32, 19 * 16 + 32, 2 * 16 + 32], dtype=torch.int32))
    function = nsa_compress_attention_infer
    hidden, _ = call(function, problem, impl)
    seen, _ = call(function, problem._replace(raw=None), impl)
    assert not torch.allclose(hidden, seen)
    for changes in ({"atten_mask": None}, {"actual_sel_seq_kvlen": None}):
        assert torch.equal(call(function, problem, impl, **changes)[0], seen)
    for mask in (torch.zeros(7, 1, 1).bfloat16(), torch.ones(3, dtype=torch.bool), torch.zeros(0)):
        assert torch.equal(call(function, problem, impl, atten_mask=mask)[0], hidden)
    assert torch.equal(call(function, problem, impl, topk_mask=torch.ones(2, 9).bool())[0], hidden)
    single = make(BASE, (60, 60), (1, 1), columns=4)
    alone = call(function, single, impl)
    wrong = call(function, single, impl, atten_mask=torch.ones(1), actual_sel_seq_kvlen=[3, 3])  # ignored
    assert all(torch.equal(a, b) for a, b in zip(alone, wrong, strict=True))


@every_impl
def test_a_query_token_that_sees_nothing(impl):
    problem = make(Sizes(4, 2, 8, 8, 16, (32, 16), 32, 3), (1,), (2,))
    problem = problem._replace(raw=torch.tensor([32], dtype=torch.int32))
    output, ids = call(nsa_compress_attention_infer, problem, impl)
    assert not output[0].any()
    assert output[1].any()
    assert ids.tolist() == [[[0, -1, -1]] * 2] * 2


@every_impl
def test_no_compressed_token_yet(impl):
    problem = make(BASE, (0, 20, 40), (3, 3, 3), hides=True, columns=4)
    output, ids = call(nsa_compress_attention_infer, problem, impl)
    assert not output[:3].any()
    assert (ids[:3] == -1).all()
    assert_right((output, ids), problem)


# --- layouts ---------------------------------------------------------------------------------------------------------


@every_impl
def test_bsnd_is_tnd(impl):
    problem = make(BASE, (40, 0, 17), (3, 3, 3), hides=True, columns=4)
    packed = call(nsa_compress_attention_infer, problem, impl)
    wide = problem._replace(query=problem.query.view(3, 3, 4, 8))
    for qlen in (None, [3, 3, 3], torch.tensor([3, 3, 3])):
        batched = call(
            nsa_compress_attention_infer,
            wide,
            impl,
            actual_seq_qlen=qlen,
            block_table=problem.table.long(),
            actual_cmp_seq_kvlen=problem.lengths.numpy(),
            actual_sel_seq_kvlen=tuple(problem.raw.tolist()),
        )
        assert [tuple(tensor.shape) for tensor in batched] == [(3, 3, 4, 6), (3, 3, 2, 4)]
        assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(batched, packed, strict=True))


@every_impl
def test_ragged_query_tokens(impl):
    spread = make(BASE, (40, 9, 17), (1, 4, 2), apart=4, hides=True, columns=4)
    packed = make(BASE, (40, 9, 17), (1, 4, 2), hides=True, columns=4)
    changes = {"actual_seq_qlen": [1, 4, 2]}
    output, ids = call(nsa_compress_attention_infer, packed, impl, **changes)
    assert_right((output, ids), packed)
    batched = spread._replace(query=spread.query.view(3, 4, 4, 8))
    wide_output, wide_ids = call(nsa_compress_attention_infer, batched, impl, **changes)
    valid = torch.arange(4) < torch.tensor([[1], [4], [2]])
    assert torch.equal(wide_output[valid], output)
    assert torch.equal(wide_ids[valid], ids)
    assert not wide_output[~valid].any()
    assert (wide_ids[~valid] == -1).all()


@every_impl
def test_caches_of_any_strides(impl):
    problem = make(BASE, (40, 17), (1, 1), columns=4)
    expected = call(nsa_compress_attention_infer, problem, impl)
    joint = torch.full((len(problem.key), 2, 16, 14), float("nan"))  # heads before rows
    key, value = joint[..., :8].transpose(1, 2), joint[..., 8:].transpose(1, 2)
    key.copy_(problem.key)
    value.copy_(problem.value)
    query = problem.query.transpose(0, 2).contiguous().transpose(0, 2)
    actual = call(nsa_compress_attention_infer, problem._replace(query=query, key=key, value=value), impl)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("count", [3, 7])
@pytest.mark.parametrize(("first", "last"), [(1, 2), (0, 3), (2, 0), (9, 1), (0, 0)])
def test_blocks_are_chosen_up_to_that_of_the_query_token(first, last, count):
    generator = torch.Generator().manual_seed(first + last)
    scores = torch.randint(0, 4, (6, 2, 5), generator=generator).double()
    scores[0, 0, 0] = torch.nan
    own = torch.tensor([0, 1, 3, 4, 5, -1])
    ids = reference.best_blocks_up_to(own, scores, count, first, last)
    for t, newest in enumerate(own.tolist()):
        for head in range(2):
            known = [*scores[t, head].nan_to_num(0.0).tolist(), 0.0]  # block 5 has no score
            always = {j for j in range(newest + 1) if j < first or j > newest - last}
            ranked = sorted((-known[j], j) for j in set(range(newest + 1)) - always)
            wanted = (sorted(always) + [j for _, j in ranked])[:count]
            assert ids[t, head].tolist() == wanted + [-1] * (count - len(wanted))
