"""The specification against a second formula; layouts; what a window means, on every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops.select_attention_infer import nsa_select_attention_infer
from nsa_triton.ops.sliding_window_attention_infer import reference
from tests.fuzzing import fuzzed
from tests.ops.paged_reference import PagedLayouts, PagedReference, close
from tests.ops.sliding_window_attention_infer.cases import OP, Sizes, every_impl, make, naive

SMALL = Sizes(heads=4, kv_heads=2, key_dim=6, value_dim=5, page=16, window=20)


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


class TestReference(PagedReference):
    op = OP
    small = SMALL


@every_impl
class TestLayouts(PagedLayouts):
    op = OP
    small = SMALL


# --- meaning ---------------------------------------------------------------------------------------------------------


@every_impl
def test_a_window_of_one_token_gives_its_value(impl):
    problem = make(SMALL._replace(window=1), [50, 16], [1, 1])
    output, _ = OP(problem, impl=impl)
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
    close(OP(problem, impl=impl)[0].view(2, 2, 5), expected[0], 1e-5)
    once_more = OP(problem._replace(window=70), impl=impl)[0]
    close(OP(problem, impl=impl)[0], once_more, 1e-6)


@every_impl
def test_a_window_of_whole_blocks_is_a_selection_of_these(impl):
    """The newest two blocks of 16, with a sequence that ends with its block."""
    problem = make(SMALL._replace(window=32), [64, 48], [1, 1])
    output, lse = OP(problem, impl=impl)
    newest = torch.tensor([[[3, 2]] * 2, [[1, 2]] * 2], dtype=torch.int32)
    sizes = (problem.scale, 4, 2, 16, 2, 16)
    more: Any = {"layout": "TND", "block_table": problem.table, "actual_seq_kvlen": [64, 48], "return_lse": True}
    selected = nsa_select_attention_infer(problem.query, problem.key, problem.value, newest, *sizes, **more, impl=impl)
    close((output, lse), selected, 1e-6)


@every_impl
def test_a_query_token_sees_up_to_itself(impl):
    """Query token t of q on n tokens is the only query token of n - (q - 1 - t) tokens."""
    problem = make(SMALL, [65], [3])
    output, lse = OP(problem, impl=impl)
    for t, seen in enumerate((63, 64, 65)):
        alone = problem._replace(query=problem.query[t : t + 1], lengths=torch.tensor([seen], dtype=torch.int32))
        close(OP(alone, impl=impl), (output[t : t + 1], lse[t : t + 1]), 1e-6)


@every_impl
def test_nothing_is_seen_of_an_empty_cache(impl):
    problem = make(SMALL, [0, 40], [1, 1])
    output, lse = OP(problem, impl=impl, actual_seq_qlen=None)  # one each, whatever is cached
    assert not output[0].any()
    assert (lse[0] == -torch.inf).all()
    assert output[1].all()
    assert lse[1].isfinite().all()


@every_impl
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_what_sees_it_and_nothing_else(bad, impl):
    """Token 43 of 64 is the last one that the window of 20 of the newest token does not see."""
    problem = make(SMALL, [64, 64], [2, 2])
    clean = OP(problem, impl=impl)[0]
    value = problem.value.clone()
    value[problem.table[0, 2], 43 - 32, 0] = bad  # of batch 0, kv head 0
    dirty = OP(problem, value=value, impl=impl)[0]
    spoiled = torch.zeros_like(dirty, dtype=torch.bool)
    spoiled[0, :2] = True
    assert torch.equal(~dirty.isfinite(), spoiled)
    assert torch.equal(dirty[~spoiled], clean[~spoiled])
