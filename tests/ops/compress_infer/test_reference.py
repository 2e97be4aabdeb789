"""The specification against a naive loop, CANN's acceptance data, and decoding token by token."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ops.compress import reference as whole
from nsa_triton.ops.compress_infer import nsa_compress_infer, reference
from tests.ops.compress_infer.cases import assert_rest_untouched, every_impl, make, naive

WINDOWS = [(16, 16), (32, 16), (48, 32), (64, 64), (128, 16)]
LENGTHS = [0, 31, 32, 33, 48, 64, 128, 130, 144]


@pytest.mark.parametrize("page", [16, 48, 64, None])
@pytest.mark.parametrize("new_tokens", [1, 2, 16, 17, 40])
@pytest.mark.parametrize(("block", "stride"), WINDOWS)
def test_reference_is_the_naive_loop(block, stride, new_tokens, page):
    call = make(LENGTHS, 3, 5, block, stride, page, new_tokens, torch.float64)
    expected, written = naive(call)
    actual = call.run(reference.forward)
    assert written
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_rest_untouched(actual, call, written)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float32_and_rounded_once(dtype):
    call = make([128, 160], block=128, dtype=dtype, seed=3)
    expected, written = naive(call)
    assert written
    tolerance = torch.finfo(dtype).eps / 2 + 128 * torch.finfo(torch.float32).eps
    actual = nsa_compress_infer(**call.arguments(impl="reference"))
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=1e-4)


@every_impl
def test_op_plugin_data(impl):
    """CANN's own test: no window is complete, so that neither slot nor page id means anything."""
    torch.manual_seed(0)
    for _ in range(5):
        cache = torch.zeros(1, 1, 192).half()
        returned = nsa_compress_infer(
            torch.randn(1, 128, 1, 192).half(),
            torch.randn(32, 1).half(),
            torch.randn(1).int(),
            32,
            16,
            128,
            block_table=torch.randn(1, 1).int(),
            actual_seq_len=[43],
            cache=cache,
            impl=impl,
        )
        assert returned is cache
        assert not cache.any()


@every_impl
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_decoding_step_by_step_is_compressing_the_whole(impl, tokens):
    """Three sequences grow by `tokens` a step, in pages that are dealt as they come; rows of cache likewise."""
    block, stride, page, steps, batch = 32, 16, 16, -(-150 // tokens), 3
    sequences = torch.randn(batch, steps * tokens, 2, 16)
    weight = torch.randn(block, 2)
    pages = torch.full((40, page, 2, 16), float("nan"))
    windows = -(-tokens // stride)
    table, done, free = torch.full((batch, 11), -1), [0] * batch, iter(torch.randperm(40).tolist())
    rows: list[list[int]] = [[] for _ in range(batch)]
    cache = torch.full((40, 2, 16), float("nan"))
    unused = iter(torch.randperm(40).tolist())
    for step in range(steps):
        lengths = [(step + 1) * tokens if b != 1 else step * tokens for b in range(batch)]  # batch 1 comes a step later
        slots = torch.full((batch, windows), 2**31 - 1)
        for b, length in enumerate(lengths):
            for t in range(done[b], length):
                if t % page == 0:
                    table[b, t // page] = next(free)
                pages[table[b, t // page], t % page] = sequences[b, t]
            for k in range(max(0, length - 16) // 16 - len(rows[b])):
                rows[b].append(next(unused))
                slots[b, k] = rows[b][-1]
            done[b] = length
        call = {"block_table": table, "actual_seq_len": lengths, "new_tokens": tokens, "impl": impl}
        nsa_compress_infer(pages, weight, slots, block, stride, page, cache=cache, **call)
    for b in range(batch):
        expected = whole.forward(sequences[b, : done[b]], weight, block, stride, (done[b],))
        assert len(expected) == len(rows[b]) > 5
        torch.testing.assert_close(cache[rows[b]], expected, rtol=1e-5, atol=1e-5)
    assert cache[[row for row in range(40) if not any(row in own for own in rows)]].isnan().all()


@every_impl
def test_a_bad_token_spoils_the_windows_that_cover_it_and_no_others(impl):
    call = make([64, 80], page=16, seed=4)
    call = call._replace(table=torch.arange(10).view(2, 5), slots=torch.tensor([[0], [1]]))
    call.input[2, 15, 1, 3] = float("inf")  # token 47 of batch 0; the windows read tokens 32 to 63, and 48 to 79
    call.input[7, 15, 0, 2] = float("nan")  # token 47 of batch 1
    cache = nsa_compress_infer(**call.arguments(impl=impl))
    spoiled = torch.zeros_like(cache, dtype=torch.bool)
    spoiled[0, 1, 3] = True
    assert torch.equal(~cache.isfinite(), spoiled)
