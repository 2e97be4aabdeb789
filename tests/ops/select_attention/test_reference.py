"""The specification against a second formula and autograd; the acceptance data of CANN on every implementation."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as given_any
from hypothesis import strategies as st

from nsa_triton import npu_nsa_select_attention, npu_nsa_select_attention_grad
from nsa_triton.ops._common import implementation
from nsa_triton.ops.select_attention import nsa_select_attention, nsa_select_attention_grad, reference
from tests.fuzzing import fuzzed
from tests.ops.select_attention.cases import (
    LOWEST,
    Problem,
    Sizes,
    assert_cann_close,
    clean,
    every_impl,
    gradients_of,
    make,
    naive,
    naive_gradients,
    random_grad,
    segments,
    statistics,
)

SMALL = Sizes(heads=4, kv_heads=2, key_dim=6, value_dim=5, block=16, entries=3)
both = pytest.mark.parametrize("causal", [False, True])


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@both
@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys"), [([20], [70]), ([0, 1, 9, 0], [0, 1, 95, 40]), ([33, 4], [31, 0]), ([2, 18, 0], [40, 17, 0])]
)
def test_reference_is_the_naive_formula(queries, keys, garbage, causal):
    for block in (16, 48):
        sizes = SMALL._replace(block=block)
        problem = make(sizes, queries, keys, torch.float64, block, garbage=garbage, behind=3, causal=causal)
        output, largest, total = reference.forward(*problem)
        close((output, largest, total), naive(problem))
        grad, tidy = random_grad(problem), clean(problem)
        gradients = gradients_of(reference.backward, tidy, grad, (output, largest, total))
        close(gradients, naive_gradients(tidy, grad), 1e-11)


@fuzzed(60)
@given_any(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=4),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    dims=st.sampled_from([(3, 2), (8, 8), (5, 7)]),
    block=st.sampled_from([16, 48, 64]),
    entries=st.integers(1, 4),
    behind=st.integers(0, 2),
    seed=st.integers(0, 999),
    garbage=st.booleans(),
    causal=st.booleans(),
)
def test_any_problem_is_the_naive_formula(
    lengths, group, kv_heads, dims, block, entries, behind, seed, garbage, causal
):
    queries, keys = zip(*lengths, strict=True)
    if sum(queries) + behind == 0:
        queries = (*queries[:-1], 1)
    sizes = Sizes(group * kv_heads, kv_heads, dims[0], dims[1], block, entries)
    problem = make(sizes, queries, keys, torch.float64, seed, garbage=garbage, causal=causal, behind=behind)
    forward = reference.forward(*problem)
    close(forward, naive(problem))
    grad, tidy = random_grad(problem), clean(problem)
    close(gradients_of(reference.backward, tidy, grad, forward), naive_gradients(tidy, grad), 1e-11)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_everything_is_float32_but_the_probabilities(dtype, causal):
    problem = make(SMALL, [20, 9], [40, 50], dtype, causal=causal)
    output, largest, total = reference.forward(*problem)
    expected, expected_largest, expected_total = naive(problem)
    assert (output.dtype, largest.dtype, total.dtype) == (dtype, torch.float32, torch.float32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=eps, atol=2 * eps)
    close((largest, total), (expected_largest, expected_total), 2e-6)
    grad = random_grad(problem)
    gradients = gradients_of(reference.backward, problem, grad, naive(problem))
    for one, other in zip(gradients, naive_gradients(problem, grad), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=eps, atol=1e-5)


def numbers(problem) -> dict[str, Any]:
    return {
        "topk_indices": problem.ids,
        "scale_value": problem.scale,
        "head_num": problem.query.shape[1],
        "select_block_size": problem.block,
        "select_block_count": problem.ids.shape[2],
        "actual_seq_qlen": problem.query_ends,
        "actual_seq_kvlen": problem.key_ends,
        "causal": problem.causal,
    }


def public(problem: Problem, impl="reference", **changes) -> Any:
    """The same problem as a public call."""
    tensors = {"query": problem.query, "key": problem.key, "value": problem.value}
    return nsa_select_attention(**tensors | numbers(problem) | {"impl": impl} | changes)


def gradient(problem: Problem, grad, given, impl="reference", **changes) -> Any:
    tensors: dict[str, Any] = {"grad": grad, "query": problem.query, "key": problem.key, "value": problem.value}
    tensors |= dict(zip(("attention_out", "softmax_max", "softmax_sum"), given, strict=True))
    return nsa_select_attention_grad(**tensors | numbers(problem) | {"impl": impl} | changes)


@both
def test_gradcheck(causal):
    sizes = Sizes(heads=2, kv_heads=1, key_dim=3, value_dim=2, block=16, entries=2)
    problem = clean(make(sizes, [0, 1, 4], [5, 4, 20], torch.float64, causal=causal, behind=1))
    leaves = [tensor.requires_grad_() for tensor in problem[:3]]

    def call(*tensors):
        return public(problem, **dict(zip(("query", "key", "value"), tensors, strict=True)))[0]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=not causal)
    grad = random_grad(problem)
    gradients = torch.autograd.grad(public(problem)[0], leaves, grad)
    close(gradients, naive_gradients(problem, grad), 1e-5)  # the statistics on the way are float32


# --- meaning ---------------------------------------------------------------------------------------------------------


@every_impl
def test_what_an_entry_of_the_list_means(impl):
    problem = make(SMALL._replace(entries=4), [1], [70])

    def with_ids(*ids):
        return public(problem, impl, topk_indices=torch.tensor(ids, dtype=torch.int32).expand(1, 2, 4))

    once = with_ids(0, 2, -1, -1)
    for same in ((-1, 0, -1, 2), (0, 2, 5, 6), (2**31 - 1, 0, 2, -(2**31)), (2, 0, -1, -1)):
        close(with_ids(*same), once, 1e-6)
    output, largest, total = with_ids(0, 2, 0, 2)
    close((output, largest, total), (once[0], once[1], 2 * once[2]), 1e-6)
    output, largest, total = with_ids(-1, -1, 5, -7)
    assert not output.any()
    assert (largest == LOWEST).all()
    assert not total.any()


@every_impl
def test_a_query_token_sees_up_to_itself(impl):
    """Token t of a causal segment is a query token of its own, which is not causal, on t + 1 key tokens."""
    problem = make(SMALL, [21], [40], causal=True)
    output, largest, total = public(problem, impl)
    for t in (0, 15, 16, 20):
        alone = problem._replace(query=problem.query[t : t + 1], ids=problem.ids[t : t + 1], causal=False)
        alone = alone._replace(query_ends=(1,), key_ends=(t + 1,))
        close(public(alone, impl), (output[t : t + 1], largest[t : t + 1], total[t : t + 1]), 1e-6)


@every_impl
def test_causal_is_said_by_a_mask_or_by_name(impl):
    problem = make(SMALL, [30], [30], causal=True)
    expected = public(problem, impl)
    full = public(problem._replace(causal=False), impl)
    for mask in (torch.zeros(3, 3).bool(), torch.ones(1, dtype=torch.uint8), torch.zeros(0)):
        for causal in (None, True):
            actual = public(problem, impl, atten_mask=mask, causal=causal)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    actual = public(problem, impl, causal=None)
    assert all(torch.equal(a, b) for a, b in zip(actual, full, strict=True))
    assert not torch.equal(full[0], expected[0])


@every_impl
def test_the_gradient_is_causal_unless_told_otherwise(impl):
    problem = make(SMALL, [30], [30], causal=True)
    grad, given = random_grad(problem), statistics(problem)
    causal, full = (gradient(problem, grad, given, impl, causal=flag) for flag in (True, False))
    more = numbers(problem) | {"impl": impl}
    del more["causal"]
    direct: Any = nsa_select_attention_grad
    for mask in (None, torch.zeros(3, 3).bool()):
        default = direct(grad, *problem[:3], *given, **more, atten_mask=mask)
        assert all(torch.equal(a, b) for a, b in zip(default, causal, strict=True))
    assert not torch.equal(full[1], causal[1])


@every_impl
def test_autograd_follows_the_forward_call(impl):
    for causal in (False, True):
        problem = make(SMALL, [20, 13], [20, 40], causal=causal)
        leaves = [tensor.requires_grad_() for tensor in problem[:3]]
        output, largest, total = public(problem, impl)
        grad = random_grad(problem)
        gradients = torch.autograd.grad(output, leaves, grad)
        close(gradients, naive_gradients(problem, grad), 2e-5)
        direct = gradient(problem, grad, (output, largest, total), impl)
        assert all(torch.equal(a, b) for a, b in zip(gradients, direct, strict=True))


@every_impl
@both
def test_segments_alone_give_what_they_give_together(causal, impl):
    problem = make(SMALL, [17, 0, 1, 20], [40, 33, 16, 5], causal=causal, behind=3)
    output, largest, total = public(problem, impl)
    for of_queries, of_keys in segments(problem):
        if of_queries.start == of_queries.stop:
            continue
        alone = Problem(
            problem.query[of_queries],
            problem.key[of_keys],
            problem.value[of_keys],
            problem.ids[of_queries],
            (of_queries.stop - of_queries.start,),
            (of_keys.stop - of_keys.start,),
            *problem[6:],
        )
        close(public(alone, impl), (output[of_queries], largest[of_queries], total[of_queries]), 1e-6)


@every_impl
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_what_selects_it_and_nothing_else(bad, impl):
    """Kernels take adjacent query tokens of a segment together: neighbours of those that selected it may be spoiled."""
    problem = make(SMALL, [4, 4], [40, 40])
    problem.ids[:] = 0
    problem.ids[1, 0] = torch.tensor([0, 1, 2])  # query token 1 and kv head 0 of the first segment
    expected = public(problem, impl)[0]
    value = problem.value.clone()
    value[20, 0, 0] = bad
    dirty = public(problem, impl, value=value)[0]
    spoiled = torch.zeros_like(dirty, dtype=torch.bool)
    spoiled[1, :2, 0] = True
    assert not dirty[spoiled].isfinite().any()
    if impl == "triton":
        spoiled[:4, :2, 0] = True
    assert torch.equal(dirty[~spoiled], expected[~spoiled])


@every_impl
def test_tokens_that_nobody_selects_have_no_gradient(impl):
    problem = make(SMALL, [20], [60])
    problem.ids[:] = torch.tensor([0, 2, -1], dtype=torch.int32)
    grad, given = random_grad(problem), statistics(problem)
    _, key_grad, value_grad = gradient(problem, grad, given, impl)
    unseen = torch.ones(60, dtype=torch.bool)
    unseen[:16] = unseen[32:48] = False
    for of_tokens in (key_grad, value_grad):
        assert not of_tokens[unseen].any()
        assert of_tokens[~unseen].all()


@every_impl
def test_every_kind_of_length_list_and_index_means_the_same(impl):
    problem = make(SMALL, [20, 0, 9], [40, 33, 5])
    expected = public(problem, impl)
    for kind in (list, tuple, np.array, torch.tensor, lambda entries: torch.tensor(entries, dtype=torch.int32)):
        lengths = {"actual_seq_qlen": kind(problem.query_ends), "actual_seq_kvlen": kind(problem.key_ends)}
        actual = public(problem, impl, **lengths)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    absent = (problem.ids < 0) | (problem.ids > 2)
    for ids in (
        problem.ids.short(),
        torch.where(absent, -(2**40), problem.ids.long()),
        torch.where(absent, 2**32, problem.ids.long()),  # block 0, if it were cut to 32 bits
    ):
        actual = public(problem, impl, topk_indices=ids)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    for scale in (2.0, np.float32(2), np.int64(2)):
        assert torch.equal(public(problem, impl, scale_value=scale)[0], public(problem, impl, scale_value=2)[0])


@every_impl
@both
def test_strided_tensors_give_the_bits_of_dense_ones(causal, impl):
    problem = make(SMALL._replace(key_dim=16, value_dim=16), [20, 9], [40, 33], causal=causal)
    grad, given = random_grad(problem), statistics(problem)
    expected = (*public(problem, impl), *gradient(problem, grad, given, impl))

    def turned(tensor):
        return tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    def wide(tensor):  # every second entry of each dimension, between NaN or bad ids
        bad = float("nan") if tensor.is_floating_point() else 2**30
        holder = torch.full([2 * size for size in tensor.shape], bad, dtype=tensor.dtype)
        return holder[::2, ::2, ::2].copy_(tensor)

    for change in (turned, wide):
        other = Problem(*(change(tensor) for tensor in problem[:4]), *problem[4:])
        gradients = gradient(other, change(grad), [change(part) for part in given], impl)
        actual = (*public(other, impl), *gradients)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_impl
def test_nothing_to_do_gives_empty_or_zero_tensors(impl):
    problem = make(SMALL, [0, 0], [20, 0])
    output, largest, total = public(problem, impl)
    assert (output.shape, largest.shape, total.shape) == ((0, 4, 5), (0, 4, 8), (0, 4, 8))
    for of_nothing in gradient(problem, output, (output, largest, total), impl)[1:]:
        assert not of_nothing.any()
    no_heads = make(SMALL, [3], [20])._replace(query=torch.zeros(3, 0, 6))
    output, largest, total = public(no_heads, impl)
    assert (output.shape, largest.shape) == ((3, 0, 5), (3, 0, 8))
    query_grad, key_grad, value_grad = gradient(no_heads, output, (output, largest, total), impl)
    assert query_grad.shape == (3, 0, 6)
    assert not key_grad.any()
    assert not value_grad.any()
    behind = make(SMALL, [0], [0], behind=4)
    output, largest, total = public(behind, impl)
    assert not output.any()
    assert (largest == LOWEST).all()
    assert not total.any()
    assert not any(part.any() for part in gradient(behind, random_grad(behind), (output, largest, total), impl))


# --- acceptance data -------------------------------------------------------------------------------------------------


@every_impl
def test_op_plugin_data(impl):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 115, 192), (1088, 115, 192), (1088, 115, 128))
    query, key, value = (torch.randn(shape, generator=generator).half() for shape in shapes)
    ids = torch.arange(16, dtype=torch.int32).expand(1, 115, 16)
    lengths: dict[str, Any] = {"actual_seq_qlen": [1], "actual_seq_kvlen": [1088]}
    actual = npu_nsa_select_attention(query, key, value, ids, 1.0, 115, 64, 16, **lengths, impl=impl)
    scores = torch.einsum("hd,phd->hp", query[0].float(), key[:1024].float())
    weights = torch.softmax(scores, 1)
    if impl == "reference":  # rounds P, as CANN's golden; kernels round exp(s - max), which is closer to the truth
        weights = weights.half().float()
    golden = torch.einsum("hp,phd->hd", weights, value[:1024].float())
    assert_cann_close(actual[0], golden[None])
    largest = scores.amax(1)
    total = (scores - largest[:, None]).exp().sum(1)
    for one, other in zip(actual[1:], (largest, total), strict=True):
        assert_cann_close(one, other[None, :, None].expand(1, 115, 8), 1e-4)


@every_impl
def test_op_plugin_gradient_data(impl):
    """A random attention_out, causal statistics, and a causal gradient although no mask is given."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, 192), (1, 1, 192), (1, 1, 192), (1024, 1, 192), (1024, 1, 192))
    grad, query, out, key, value = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    largest = (0.01 * (query[0, 0].float() @ key[0, 0].float())).expand(1, 1, 8).contiguous()
    total = torch.ones(1, 1, 8)
    ids = torch.arange(16, dtype=torch.int32).expand(1, 1, 16)
    lengths: dict[str, Any] = {"actual_seq_qlen": [1], "actual_seq_kvlen": [1024]}
    rest = (ids, 0.01, 1, 64, 16)
    actual = npu_nsa_select_attention_grad(grad, query, key, value, out, largest, total, *rest, **lengths, impl=impl)
    ds = (grad.float() * (value[:1].float() - out.float())).sum()  # of the only score, whose probability is 1
    query_grad, key_grad, value_grad = key[:1].float() * ds * 0.01, torch.zeros(1024, 1, 192), torch.zeros(1024, 1, 192)
    key_grad[0], value_grad[0] = query[0].float() * ds * 0.01, grad[0].float()
    for one, golden in zip(actual, (query_grad, key_grad, value_grad), strict=True):
        torch.testing.assert_close(one.float(), golden, rtol=0.004, atol=0.004)


def dense_golden(query, key, value, ids, scale, block):
    """One causal segment in float64, with a mask of how often each token is selected."""
    tokens, n_keys, kv_heads = len(query), len(key), key.shape[1]
    count = torch.zeros(tokens, kv_heads, -(-n_keys // block) + 1)
    valid = (ids >= 0) & (ids < count.shape[2] - 1)
    count.scatter_add_(2, torch.where(valid, ids.long(), count.shape[2] - 1), valid.float())
    times = count.repeat_interleave(block, 2)[..., :n_keys].double()
    times = times * (torch.arange(n_keys) <= torch.arange(tokens)[:, None])[:, None]
    group = query.shape[1] // kv_heads
    q, k, v = query.double().unflatten(1, (kv_heads, group)), key.double(), value.double()
    scores = torch.einsum("tngd,pnd->tngp", q, k) * scale + times.log()[:, :, None]
    weights = torch.softmax(scores, -1).nan_to_num(0.0)  # where nothing is selected
    return torch.einsum("tngp,pnd->tngd", weights, v).flatten(1, 2)


@every_impl
def test_documentation_example(impl):
    """Negative ids, many of them the same, a mask of another size that only says that attention is causal."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((256, 16, 192), (3072, 4, 192), (3072, 4, 128))
    query, key, value = (torch.randn(shape, generator=generator).half() for shape in shapes)
    ids = torch.randn(256, 4, 16, generator=generator).int()
    assert (ids < 0).any()
    mask = torch.randn(512, 2048, generator=generator).bool()
    lengths: dict[str, Any] = {"actual_seq_qlen": [128, 256], "actual_seq_kvlen": [2048, 3072]}
    output = npu_nsa_select_attention(query, key, value, ids, 1.0, 16, 64, 16, atten_mask=mask, **lengths, impl=impl)[0]
    assert output.shape == (256, 16, 128)
    golden = torch.cat(
        [
            dense_golden(query[:128], key[:2048], value[:2048], ids[:128], 1.0, 64),
            dense_golden(query[128:], key[2048:], value[2048:], ids[128:], 1.0, 64),
        ]
    )
    largest = float(value.abs().max())  # each probability and the output are rounded to float16
    torch.testing.assert_close(output.double(), golden, rtol=2**-10, atol=2**-10 * largest)


@every_impl
def test_aclnn_sample(impl):
    """Every token selects block 2, sixteen times; 32 query tokens of each segment for the reference, which is slow."""
    generator = torch.Generator().manual_seed(0)
    each = 512 if impl == "triton" else 32
    shapes = ((2 * each, 16, 192), (4096, 4, 192), (4096, 4, 128))
    query, key, value = (torch.randn(shape, generator=generator).half() for shape in shapes)
    ids = torch.full((2 * each, 4, 16), 2, dtype=torch.int32)
    lengths: dict[str, Any] = {"actual_seq_qlen": [each, 2 * each], "actual_seq_kvlen": [2048, 4096]}
    output, _, total = npu_nsa_select_attention(query, key, value, ids, 192**-0.5, 16, 64, 16, **lengths, impl=impl)
    for segment in (0, 1):
        rows, tokens = slice(segment * each, (segment + 1) * each), slice(segment * 2048 + 128, segment * 2048 + 192)
        k, v = (tensor[tokens].double() for tensor in (key, value))
        q = query[rows].double().unflatten(1, (4, 4))
        weights = torch.softmax(torch.einsum("tngd,pnd->tngp", q, k) * 192**-0.5, -1)
        assert_cann_close(output[rows], torch.einsum("tngp,pnd->tngd", weights, v).flatten(1, 2))
    assert (total >= 16).all()


# --- the choice of the implementation --------------------------------------------------------------------------------


def test_auto_takes_the_reference_for_float64_and_says_so_once(caplog):
    implementation._say_once.cache_clear()
    problem = make(SMALL, [5], [20], torch.float64)
    with caplog.at_level(logging.WARNING, logger="nsa_triton"):
        for _ in range(3):
            output, largest, total = public(problem, impl="auto")
            gradient(problem, random_grad(problem), (output, largest, total), impl="auto")
    close(output, naive(problem)[0])
    assert largest.dtype == total.dtype == torch.float32
    assert "float64" in caplog.text
    assert len(caplog.records) == 1
