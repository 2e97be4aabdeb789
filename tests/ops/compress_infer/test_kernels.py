"""The kernel of compress_infer on every target that is present, against the reference in float64."""

from __future__ import annotations

import random

import pytest
import torch

from nsa_triton.ops._common.accuracy import judge
from nsa_triton.ops.compress_infer import reference
from tests.dtypes import DTYPES
from tests.ops.compress_infer.cases import assert_rest_untouched, make, naive

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

from nsa_triton.ops.compress_infer import launch

# lengths, heads, head size, window, stride, page, new tokens
SHAPES = [
    ((160, 43, 0, 32, 1040), 4, 192, 32, 16, 64, 1),
    ((80, 31, 47, 96), 1, 16, 16, 16, 16, 1),
    ((128, 96, 80, 95), 3, 100, 48, 16, 48, 33),  # windows across pages
    ((128, 256, 127), 65, 33, 128, 128, 128, 1),
    ((640, 129, 144), 2, 1, 128, 16, 64, 40),
    ((48, 80, 112, 60), 2, 80, 48, 32, 112, 17),
    ((64, 192, 65), 1, 600, 64, 64, 64, 2),
    ((32, 0, 64, 31, 200, 48), 2, 72, 32, 16, None, 1),
    ((300, 10, 128), 5, 130, 64, 32, None, 40),
]


def assert_accurate(call, device):
    """Also that no other row is written; returns how many are."""
    call = call.to(device)
    actual = call.run(launch.forward)
    eager, expected = call.run(reference.forward), call.double().run(reference.forward)
    accuracy = judge(actual, eager, expected, terms=call.block)
    assert accuracy.ok, (accuracy, call)
    written = (expected != call.cache).flatten(1).any(1).nonzero().flatten().tolist()
    assert_rest_untouched(actual, call, written)
    return len(written)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_as_accurate_as_eager(shape, dtype, device):
    call = make(*shape, dtype)
    expected, written = naive(call)
    assert assert_accurate(call, device) == len(written)
    torch.testing.assert_close(call.double().run(reference.forward), expected)


@pytest.mark.parametrize("new_tokens", range(1, 41))
def test_any_number_of_new_tokens(new_tokens, device):
    call = make((75, 76, 80, 83, 96, 111, 112), 1, 16, 32, 16, 16, new_tokens, seed=new_tokens)
    assert assert_accurate(call, device) == len(naive(call)[1])


@pytest.mark.usefixtures("one_thread")
def test_a_thousand_random_calls(device):
    """Any lengths, pages, slots and tokens on few kernels: they are run-time arguments, and cost no compile."""
    choose, written = random.Random(0), 0
    for seed in range(1000):
        batch = choose.randint(1, 4)
        lengths = [choose.choice([choose.randrange(150), 16 * choose.randrange(10)]) for _ in range(batch)]
        block, stride = choose.choice([(32, 16), (48, 48)])
        size, dtype = choose.choice([(16, torch.float32), (40, torch.bfloat16), (100, torch.float16)])
        page, index = choose.choice([(16, torch.int32), (48, torch.int32), (64, torch.int64), (None, torch.int32)])
        new_tokens = choose.choice([1, 1, 2, 16, choose.randint(1, 60)])
        heads = choose.randint(1, 3)
        call = make(lengths, heads, size, block, stride, page, new_tokens, dtype, seed, index)
        written += assert_accurate(call, device)
    assert written > 800


def test_results_are_bit_identical_on_repeat_and_with_any_number_of_threads(device):
    call = make((160, 144, 1040, 512, 80), 4, 128, 32, 16, 64, 40, torch.bfloat16).to(device)
    once, threads = call.run(launch.forward), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(once, call.run(launch.forward))
    finally:
        torch.set_num_threads(threads)


def spread(tensor):
    """The same values with gaps of NaN between pages, tokens and heads; the last dimension stays dense."""
    shape = [*(2 * size for size in tensor.shape[:-1]), tensor.shape[-1] + 7]
    wide = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    for dim, size in enumerate(tensor.shape[:-1]):
        wide = wide.narrow(dim, 1, 2 * size - 1)[(slice(None),) * dim + (slice(None, None, 2),)]
    return wide[..., 3:-4].copy_(tensor)


@pytest.mark.parametrize("page", [48, None])
def test_strided_tensors_give_the_bits_of_dense_ones(page, device):
    call = make((160, 33, 96), 3, 40, 48, 16, page, 20, torch.float16).to(device)
    dense = call.run(launch.forward)
    turned = call.weight.t().contiguous().t()
    indices = {
        name: spread(getattr(call, name)[..., None].double()).to(torch.int32)[..., 0] for name in ("slots", "lengths")
    }
    if page is not None:
        indices["table"] = call.table.t().contiguous().t()
    heads_first = call.input.transpose(-3, -2).contiguous().transpose(-3, -2)
    for input in (spread(call.input), heads_first):
        cache = spread(call.cache)
        launch.forward(*call._replace(input=input, weight=turned, cache=cache, **indices))
        assert torch.equal(cache, dense)
        gaps = cache._base.clone()
        torch.as_strided(gaps, cache.shape, cache.stride(), cache.storage_offset()).fill_(float("nan"))
        assert gaps.isnan().all()


@pytest.mark.parametrize("index", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_every_integer_dtype_of_indices(index, device):
    call = make((80, 96), page=16, seed=1).to(device)
    pages = torch.arange(12, device=device).view(2, 6)
    slots = torch.tensor([[1], [0]], device=device)
    expected = call._replace(table=pages, slots=slots).run(reference.forward)
    actual = call._replace(table=pages.to(index), slots=slots.to(index), lengths=call.lengths.to(index))
    torch.testing.assert_close(actual.run(launch.forward), expected, rtol=1e-5, atol=1e-5)


def test_a_slot_beyond_32_bits_is_skipped_not_wrapped(device):
    call = make((32, 48), page=16).to(device)
    slots = torch.tensor([[2**32], [-(2**40)]], device=device)
    pages = torch.zeros((2, 3), dtype=torch.int64, device=device)
    call = call._replace(slots=slots, table=pages)
    assert torch.equal(call.run(launch.forward), call.cache)
