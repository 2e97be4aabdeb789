"""The specification against a second formula; layouts; what a window means, on every implementation."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops._common import implementation
from nsa_triton.ops.select_attention_infer import nsa_select_attention_infer
from nsa_triton.ops.sliding_window_attention_infer import nsa_sliding_window_attention_infer, reference
from tests.fuzzing import fuzzed
from tests.ops.sliding_window_attention_infer.cases import Problem, Sizes, every_impl, make, naive

SMALL = Sizes(heads=4, kv_heads=2, key_dim=6, value_dim=5, page=16, window=20)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize(
    ("cached", "tokens"), [([70], [1]), ([0, 1, 95], [1, 1, 1]), ([33, 64, 9], [3, 1, 4]), ([5, 40], [2, 2])]
)
def test_reference_is_the_naive_formula(cached, tokens, garbage):
    for window, page in ((1, 16), (16, 48), (33, 32), (200, 16)):
        sizes = SMALL._replace(window=window, page=page)
        problem = make(sizes, cached, tokens, torch.float64, seed=window, garbage=garbage)
        close(reference.forward(*problem), naive(problem))


@fuzzed(150)
@given(
    cached=st.lists(st.integers(0, 120), min_size=1, max_size=3),
    extra=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    dims=st.sampled_from([(3, 2), (8, 8), (5, 7)]),
    page=st.sampled_from([16, 48, 64]),
    window=st.integers(1, 130),
    seed=st.integers(0, 999),
    garbage=st.booleans(),
)
def test_any_problem_is_the_naive_formula(cached, extra, group, kv_heads, dims, page, window, seed, garbage):
    tokens = [min(length, more) for length, more in zip(cached, extra, strict=False)]
    stride = max(1, *tokens, extra[0]) if seed % 2 else None
    sizes = Sizes(group * kv_heads, kv_heads, dims[0], dims[1], page, window)
    problem = make(sizes, cached, tokens, torch.float64, seed, garbage=garbage, stride=stride)
    close(reference.forward(*problem), naive(problem))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_everything_is_float32_and_rounded_once(dtype):
    problem = make(SMALL, [90, 33], [1, 1], dtype)
    output, lse = reference.forward(*problem)
    expected, expected_lse = naive(problem)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(output.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


def public(problem: Problem, layout="TND", *, folded=False, impl="reference", **changes) -> Any:
    """The same problem as a public call; `layout` with a batch dimension wants equally many rows for each batch."""
    query, key, value, table, lengths, rows, scale, window = problem
    heads, kv_heads, page = query.shape[1], key.shape[2], key.shape[1]
    if layout != "TND":
        query = query.unflatten(0, (len(lengths), -1))
    call: dict[str, Any] = {
        "query": query.flatten(2) if layout == "BSH" else query,
        "key": key.flatten(2) if folded else key,
        "value": value.flatten(2) if folded else value,
        "scale_value": scale,
        "head_num": heads,
        "key_value_head_num": kv_heads,
        "window_size": window,
        "page_block_size": page,
        "layout": layout,
        "block_table": table,
        "actual_seq_qlen": None if rows is None and layout != "TND" else qlens(problem),
        "actual_seq_kvlen": lengths,
        "return_lse": True,
        "impl": impl,
    }
    return nsa_sliding_window_attention_infer(**call | changes)


def qlens(problem):
    batch = len(problem.lengths)
    return [len(problem.query) // batch] * batch if problem.rows is None else problem.rows[:, 1].tolist()


@every_impl
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("tokens", "stride"), [([1, 1, 1], None), ([2, 2, 2], None), ([1, 3, 0], 3)])
def test_layouts_agree(tokens, stride, folded, impl):
    problem = make(SMALL, [50, 33, 64], tokens, stride=stride)
    expected, expected_lse = reference.forward(*problem)
    for layout in ("BSND", "BSH"):
        output, lse = public(problem, layout, folded=folded, impl=impl)
        shape = (3, len(problem.query) // 3)
        assert output.shape == ((*shape, 4, 5) if layout == "BSND" else (*shape, 20))
        assert lse.shape == (*shape, 4)
        close(output.reshape(expected.shape), expected, 1e-5)
        close(lse.flatten(0, 1), expected_lse, 1e-5)
        assert output.is_contiguous()
    if stride is None:
        output, lse = public(problem, folded=folded, impl=impl)
        close((output, lse), (expected, expected_lse), 1e-5)


@every_impl
def test_every_kind_of_length_list_and_table_means_the_same(impl):
    problem = make(SMALL, [50, 33, 64], [1, 1, 1])
    expected = public(problem, impl=impl)
    for kind in (list, tuple, np.array, torch.tensor, lambda entries: torch.tensor(entries, dtype=torch.int32)):
        actual = public(problem, impl=impl, actual_seq_kvlen=kind([50, 33, 64]), actual_seq_qlen=kind([1, 1, 1]))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    far = torch.where(problem.table < 0, 2**40, problem.table.long())
    actual = public(problem, impl=impl, block_table=far, actual_seq_qlen=None)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_impl
def test_strided_tensors_give_the_bits_of_dense_ones(impl):
    problem = make(SMALL._replace(key_dim=16, value_dim=16), [50, 33, 64], [2, 1, 2])
    expected = public(problem, impl=impl)

    def wide(tensor, dimension):  # every second entry of the dimension, NaN between
        other = torch.stack((tensor, torch.full_like(tensor, float("nan"))), dimension + 1)
        return other.flatten(dimension, dimension + 1)[(slice(None),) * dimension + (slice(None, None, 2),)]

    turned = {"key": problem.key.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)}
    turned |= {"query": problem.query.permute(2, 1, 0).contiguous().permute(2, 1, 0)}
    turned |= {"block_table": problem.table.t().contiguous().t()}
    for changes in (turned, *({name: wide(getattr(problem, name), d)} for name in ("key", "value") for d in (0, 1, 2))):
        actual = public(problem, impl=impl, **changes)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), changes.keys()


@every_impl
def test_numbers_of_numpy_are_scales_and_the_lse_is_optional(impl):
    problem = make(SMALL, [50, 33], [1, 1])
    assert torch.equal(public(problem, impl=impl, return_lse=False), public(problem, impl=impl)[0])
    twice = public(problem, impl=impl, scale_value=2)[0]
    for scale in (2.0, np.float32(2), np.int64(2)):
        assert torch.equal(public(problem, impl=impl, scale_value=scale)[0], twice)


@every_impl
def test_pages_are_dealt_in_order_without_a_block_table(impl):
    problem = make(SMALL, [50, 33, 64], [1, 1, 1])
    key, value = (torch.randn(14, *cache.shape[1:]) for cache in (problem.key, problem.value))
    table = torch.arange(12).view(3, 4)  # the longest needs 4 pages
    expected = public(problem, key=key, value=value, block_table=table, impl=impl)
    actual = public(problem, key=key, value=value, block_table=None, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# --- meaning ---------------------------------------------------------------------------------------------------------


@every_impl
def test_a_window_of_one_token_gives_its_value(impl):
    problem = make(SMALL._replace(window=1), [50, 16], [1, 1])
    output, _ = public(problem, impl=impl)
    for b, length in enumerate([50, 16]):
        own = problem.value[problem.table[b, (length - 1) // 16], (length - 1) % 16]  # [N2, Dv]
        close(output[b], own.repeat_interleave(2, 0), 1e-6)


@every_impl
def test_a_window_beyond_the_cache_is_dense_attention(impl):
    problem = make(SMALL._replace(window=10**9), [70], [1])
    keys, values = (cache[problem.table[0, :5].long()].flatten(0, 1)[:70] for cache in (problem.key, problem.value))
    query = problem.query[0].view(1, 2, 2, 6)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scale=problem.scale
    )
    close(public(problem, impl=impl)[0].view(2, 2, 5), expected[0], 1e-5)
    once_more = public(problem._replace(window=70), impl=impl)[0]
    close(public(problem, impl=impl)[0], once_more, 1e-6)


@every_impl
def test_a_window_of_whole_blocks_is_a_selection_of_these(impl):
    """The newest two blocks of 16, with a sequence that ends with its block."""
    problem = make(SMALL._replace(window=32), [64, 48], [1, 1])
    output, lse = public(problem, impl=impl)
    newest = torch.tensor([[[3, 2]] * 2, [[1, 2]] * 2], dtype=torch.int32)
    sizes = (problem.scale, 4, 2, 16, 2, 16)
    more: Any = {"layout": "TND", "block_table": problem.table, "actual_seq_kvlen": [64, 48], "return_lse": True}
    selected = nsa_select_attention_infer(problem.query, problem.key, problem.value, newest, *sizes, **more, impl=impl)
    close((output, lse), selected, 1e-6)


@every_impl
def test_a_query_token_sees_up_to_itself(impl):
    """Query token t of q on n tokens is the only query token of n - (q - 1 - t) tokens."""
    problem = make(SMALL, [65], [3])
    output, lse = public(problem, impl=impl)
    for t, seen in enumerate((63, 64, 65)):
        alone = problem._replace(query=problem.query[t : t + 1], lengths=torch.tensor([seen], dtype=torch.int32))
        close(public(alone, impl=impl), (output[t : t + 1], lse[t : t + 1]), 1e-6)


@every_impl
def test_nothing_is_seen_of_an_empty_cache(impl):
    problem = make(SMALL, [0, 40], [1, 1])
    output, lse = public(problem, impl=impl, actual_seq_qlen=None)  # one each, whatever is cached
    assert not output[0].any()
    assert (lse[0] == -torch.inf).all()
    assert output[1].all()
    assert lse[1].isfinite().all()


@every_impl
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_what_sees_it_and_nothing_else(bad, impl):
    """Token 43 of 64 is the last one that the window of 20 of the newest token does not see."""
    problem = make(SMALL, [64, 64], [2, 2])
    clean = public(problem, impl=impl)[0]
    value = problem.value.clone()
    value[problem.table[0, 2], 43 - 32, 0] = bad  # of batch 0, kv head 0
    dirty = public(problem, value=value, impl=impl)[0]
    spoiled = torch.zeros_like(dirty, dtype=torch.bool)
    spoiled[0, :2] = True
    assert torch.equal(~dirty.isfinite(), spoiled)
    assert torch.equal(dirty[~spoiled], clean[~spoiled])


# --- the choice of the implementation --------------------------------------------------------------------------------


def test_auto_takes_the_reference_for_float64_and_says_so_once(caplog):
    implementation._say_once.cache_clear()
    problem = make(SMALL, [50], [1], torch.float64)
    with caplog.at_level(logging.WARNING, logger="nsa_triton"):
        for _ in range(3):
            output, lse = public(problem, impl="auto")
    close(output, naive(problem)[0])
    assert lse.dtype == torch.float32
    assert "float64" in caplog.text
    assert len(caplog.records) == 1
