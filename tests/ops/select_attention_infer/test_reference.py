"""The specification against a second formula; layouts; the acceptance data of CANN on every implementation."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops.select_attention_infer import nsa_select_attention_infer, reference
from tests.fuzzing import fuzzed
from tests.ops.paged_reference import PagedLayouts, PagedReference, close, equal
from tests.ops.select_attention_infer.cases import (
    OP,
    Sizes,
    assert_cann_close,
    every_impl,
    make,
    naive,
    op_plugin_data,
)

SMALL = Sizes(heads=4, kv_heads=2, key_dim=6, value_dim=5, page=16, block=32, entries=3)


@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize(
    ("cached", "tokens"), [([70], [1]), ([0, 1, 95], [1, 1, 1]), ([33, 64, 9], [3, 1, 4]), ([5, 40], [2, 2])]
)
def test_reference_is_the_naive_formula(cached, tokens, garbage):
    for block, page in ((32, 16), (16, 48), (48, 32)):
        sizes = SMALL._replace(block=block, page=page)
        problem = make(sizes, cached, tokens, torch.float64, seed=block, garbage=garbage)
        close(reference.forward(*problem), naive(problem))


@fuzzed(150)
@given(
    cached=st.lists(st.integers(0, 120), min_size=1, max_size=3),
    extra=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    dims=st.sampled_from([(3, 2), (8, 8), (5, 7)]),
    page=st.sampled_from([16, 48, 64]),
    block=st.sampled_from([16, 48, 64]),
    entries=st.integers(1, 5),
    seed=st.integers(0, 999),
    garbage=st.booleans(),
)
def test_any_problem_is_the_naive_formula(cached, extra, group, kv_heads, dims, page, block, entries, seed, garbage):
    tokens = [min(length, more) for length, more in zip(cached, extra, strict=False)]
    stride = max(1, *tokens, extra[0]) if seed % 2 else None
    sizes = Sizes(group * kv_heads, kv_heads, dims[0], dims[1], page, block, entries)
    problem = make(sizes, cached, tokens, torch.float64, seed, garbage=garbage, stride=stride)
    close(reference.forward(*problem), naive(problem))


class TestReference(PagedReference):
    op = OP
    small = SMALL


@every_impl
class TestLayouts(PagedLayouts):
    op = OP
    small = SMALL


@every_impl
@pytest.mark.parametrize("folded", [False, True])
def test_ids_without_a_dimension_of_tokens_and_in_int64_mean_the_same(folded, impl):
    problem = make(SMALL, [50, 33, 64], [1, 1, 1])
    expected = OP(problem, impl=impl)
    for layout in ("BSND", "BSH"):
        three = OP(problem, layout, topk_indices=problem.ids, folded=folded, impl=impl)
        assert equal(three, OP(problem, layout, folded=folded, impl=impl))
    big = torch.where(problem.ids < 0, -(2**40), problem.ids.long())
    assert equal(OP(problem, impl=impl, topk_indices=big), expected)
    far = torch.where(problem.ids < 0, 2**32, problem.ids.long())  # block 0, if it were cut to 32 bits
    assert torch.equal(OP(problem, impl=impl, topk_indices=far)[0], expected[0])


@every_impl
def test_the_mask_is_ignored(impl):
    problem = make(SMALL, [50, 33], [1, 1])
    mask = torch.ones(3, dtype=torch.bool)
    assert equal(OP(problem, impl=impl, atten_mask=mask), OP(problem, impl=impl))


# --- meaning ---------------------------------------------------------------------------------------------------------


@every_impl
def test_what_an_entry_of_the_list_means(impl):
    problem = make(SMALL._replace(entries=4), [70], [1], dtype=torch.float64 if impl == "reference" else torch.float32)

    def with_ids(*ids):
        return OP(problem, topk_indices=torch.tensor(ids, dtype=torch.int32).expand(1, 2, 4), impl=impl)

    once = with_ids(0, 2, -1, -1)
    for same in ((-1, 0, -1, 2), (0, 2, 3, 4), (2**31 - 1, 0, 2, -(2**31)), (2, 0, -1, -1)):
        close(with_ids(*same), once, 1e-6)
    output, lse = with_ids(0, 2, 0, 2)
    close(output, once[0], 1e-6)
    close(lse, once[1] + np.log(2), 1e-6)
    output, lse = with_ids(-1, -1, 3, -7)
    assert not output.any()
    assert (lse == -torch.inf).all()


@every_impl
def test_each_kv_head_has_its_own_list(impl):
    problem = make(SMALL, [96], [1])
    ids = torch.tensor([[[0, 1, -1], [2, -1, -1]]], dtype=torch.int32)
    output = OP(problem, topk_indices=ids, impl=impl)[0]
    for head in (0, 1):
        alone = OP(problem, topk_indices=ids[:, head : head + 1].expand(1, 2, 3), impl=impl)[0]
        close(output[:, 2 * head : 2 * head + 2], alone[:, 2 * head : 2 * head + 2], 1e-6)


@every_impl
def test_a_query_token_sees_up_to_itself(impl):
    """Query token t of q on n tokens is the only query token of n - (q - 1 - t) tokens."""
    problem = make(SMALL, [65], [3])
    output, lse = OP(problem, impl=impl)
    for t, seen in enumerate((63, 64, 65)):
        alone = problem._replace(query=problem.query[t : t + 1], ids=problem.ids[t : t + 1])
        alone = alone._replace(lengths=torch.tensor([seen], dtype=torch.int32))
        close(OP(alone, impl=impl), (output[t : t + 1], lse[t : t + 1]), 1e-6)


@every_impl
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_what_selects_it_and_nothing_else(bad, impl):
    problem = make(SMALL, [96, 96], [1, 1])
    ids = torch.tensor([[[0, 1, -1], [1, -1, -1]], [[0, 2, -1], [1, 2, -1]]], dtype=torch.int32)
    clean = OP(problem, topk_indices=ids, impl=impl)[0]
    value = problem.value.clone()
    value[problem.table[0, 0], 3, 0] = bad  # token 3 of batch 0, kv head 0
    dirty = OP(problem, topk_indices=ids, value=value, impl=impl)[0]
    spoiled = torch.zeros_like(dirty, dtype=torch.bool)
    spoiled[0, :2] = True
    assert torch.equal(~dirty.isfinite(), spoiled)
    assert torch.equal(dirty[~spoiled], clean[~spoiled])


# --- acceptance data -------------------------------------------------------------------------------------------------


def golden(query, key, value, ids, table, lengths, scale, block):
    """One query token per batch, [B, N1, Dk]; caches with folded heads. float64."""
    batch, heads, _ = query.shape
    kv_heads, page = ids.shape[1], key.shape[1]
    keys, values = (cache.double().unflatten(2, (kv_heads, -1)) for cache in (key, value))
    output = torch.zeros(batch, heads, values.shape[3], dtype=torch.float64)
    for b in range(batch):
        mine = table[b, : -(-lengths[b] // page)].long()
        k, v = (cache[mine].flatten(0, 1)[: lengths[b]] for cache in (keys, values))
        for h in range(heads):
            n = h // (heads // kv_heads)
            blocks = [torch.arange(i * block, min((i + 1) * block, lengths[b])) for i in ids[b, n].tolist() if i >= 0]
            chosen = torch.cat(blocks)
            weights = torch.softmax(k[chosen, n] @ query[b, h].double() * scale, 0)
            output[b, h] = weights @ v[chosen, n]
    return output


@functools.cache
def op_plugin_golden():
    return golden(*op_plugin_data(), 2.0, 64)


@every_impl
@pytest.mark.parametrize("layout", ["BSH", "BSND", "TND"])
def test_op_plugin_data(layout, impl):
    query, key, value, ids, table, lengths = op_plugin_data()
    shaped = {"BSH": query.reshape(123, 1, 768), "BSND": query[:, None], "TND": query}[layout]
    more: dict[str, Any] = {"layout": layout, "block_table": table, "actual_seq_kvlen": lengths, "impl": impl}
    output: Any = nsa_select_attention_infer(shaped, key, value, ids, 2.0, 4, 2, 64, 2, 64, **more)
    assert_cann_close(output.reshape(123, 4, 128), op_plugin_golden())


@every_impl
def test_documentation_example(impl):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, 768), (246, 64, 384), (246, 64, 256))
    query, key, value = (torch.randn(shape, generator=generator).half() for shape in shapes)
    ids = torch.tensor([[[0, -1], [0, -1]]], dtype=torch.int32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    more: dict[str, Any] = {"layout": "BSH", "block_table": table, "actual_seq_kvlen": [82], "impl": impl}
    output: Any = nsa_select_attention_infer(query, key, value, ids, 2.0, 4, 2, 64, 2, 64, **more)
    assert output.shape == (1, 1, 512)
    expected = golden(query.view(1, 4, 192), key, value, ids, table, [82], 2.0, 64)
    assert_cann_close(output.view(1, 4, 128), expected)
