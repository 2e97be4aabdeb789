"""The kernels of compress on every target that is present, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops._common.accuracy import judge
from nsa_triton.ops.compress import reference
from tests.dtypes import shapes_in_dtypes
from tests.fuzzing import fuzzed

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

from nsa_triton.ops.compress import launch

# lengths, heads, head size, window, stride
SHAPES = [
    ((512,), 4, 128, 32, 16),
    ((31, 0, 32, 33, 1, 160), 3, 192, 32, 16),
    ((0, 15, 16, 17, 0), 1, 16, 16, 16),
    ((300, 47, 211), 2, 80, 48, 32),
    ((129, 640), 2, 64, 128, 16),
    ((400,), 1, 256, 128, 112),
    ((97, 96, 95), 5, 48, 64, 48),
    ((257,), 128, 16, 16, 16),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OWN = [BF16, FP16, FP32, BF16, FP32, BF16, FP16, FP32]  # dtype of each
each_shape = shapes_in_dtypes(SHAPES, OWN, SHAPES[3])


def make(lengths, heads, head_dim, block, stride, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ends = tuple(torch.tensor(lengths).cumsum(0).tolist())
    rows = len(reference.window_starts(block, stride, ends))
    shapes = ((rows, heads, head_dim), (ends[-1], heads, head_dim), (block, heads))
    g, x, w = (torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)
    return g, x, w, (block, stride, ends)


def assert_accurate(actual, call, inputs, geometry, index, terms):
    eager = call(*inputs, *geometry)
    expected = call(*(tensor.double() for tensor in inputs), *geometry)
    eager, expected = ((eager,), (expected,)) if isinstance(eager, torch.Tensor) else (eager, expected)
    accuracy = judge(actual, eager[index], expected[index], terms=terms)
    assert accuracy.ok, accuracy


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_forward_is_as_accurate_as_eager(shape, dtype, device):
    _, x, w, geometry = make(*shape, dtype, device)
    assert_accurate(launch.forward(x, w, *geometry), reference.forward, (x, w), geometry, 0, terms=shape[3])


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_gradients_are_as_accurate_as_eager(shape, dtype, device):
    g, x, w, geometry = make(*shape, dtype, device)
    dx, dw = launch.backward(g, x, w, *geometry)
    assert_accurate(dx, reference.backward, (g, x, w), geometry, 0, terms=-(-shape[3] // shape[4]))
    assert_accurate(dw, reference.backward, (g, x, w), geometry, 1, terms=g.shape[0] * shape[2])


def test_results_are_bit_identical_on_repeat_and_with_any_number_of_threads(device):
    g, x, w, geometry = make((700, 3, 900), 4, 128, 32, 16, torch.bfloat16, device)
    once = (launch.forward(x, w, *geometry), *launch.backward(g, x, w, *geometry))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = (launch.forward(x, w, *geometry), *launch.backward(g, x, w, *geometry))
            assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_strided_inputs_give_the_bits_of_dense_ones(device):
    g, x, w, geometry = make((200, 41), 4, 64, 32, 16, torch.float16, device)
    dense = (launch.forward(x, w, *geometry), *launch.backward(g, x, w, *geometry))
    wide_x = torch.full((241, 6, 160), float("nan"), dtype=x.dtype, device=device)[:, 1:5, 32:96].copy_(x)
    turned_x = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    turned_w = w.t().contiguous().t()
    sparse_g = torch.full((g.shape[0] * 2, *g.shape[1:]), float("nan"), dtype=g.dtype, device=device)[::2].copy_(g)
    for other_x in (wide_x, turned_x):
        strided = (
            launch.forward(other_x, turned_w, *geometry),
            *launch.backward(sparse_g, other_x, turned_w, *geometry),
        )
        assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("block", "stride"), [(32, 16), (48, 32), (16, 16)])
def test_a_bad_token_spoils_the_windows_that_cover_it_and_no_others(bad, block, stride, device):
    _, x, w, geometry = make((160, 100), 2, 32, block, stride, torch.float32, device)
    clean = launch.forward(x, w, *geometry)
    token = 75
    x[token, 1, 5] = bad
    dirty = launch.forward(x, w, *geometry)
    starts = torch.tensor(reference.window_starts(*geometry))
    covered = torch.zeros(clean.shape, dtype=torch.bool)
    covered[(starts <= token) & (token < starts + block), 1, 5] = True
    assert covered.any()
    assert torch.equal(~dirty.isfinite().cpu(), covered)
    assert torch.equal(dirty.cpu()[~covered], clean.cpu()[~covered])


@pytest.mark.parametrize(("block", "stride"), [(32, 16), (48, 32), (64, 48), (16, 16)])
def test_a_bad_gradient_row_spoils_the_tokens_of_its_window_and_no_others(block, stride, device):
    g, x, w, geometry = make((160, 100), 2, 32, block, stride, torch.float32, device)
    clean, _ = launch.backward(g, x, w, *geometry)
    row = 2
    g[row, 0, 7] = float("inf")
    dirty, _ = launch.backward(g, x, w, *geometry)
    start = reference.window_starts(*geometry)[row]
    covered = torch.zeros(clean.shape, dtype=torch.bool)
    covered[start : start + block, 0, 7] = True
    assert torch.equal(~dirty.isfinite().cpu(), covered)
    assert torch.equal(dirty.cpu()[~covered], clean.cpu()[~covered])


def test_weight_gradient_of_a_window_next_to_a_bad_one_stays_finite(device):
    """The last tile of a segment is partly filled: its missing windows must not multiply real tokens by zero."""
    g, x, w, geometry = make((64,), 1, 32, 32, 16, torch.float32, device)
    g[:] = 0
    x[:, 0, 3] = float("inf")
    _, dw = launch.backward(g, x, w, *geometry)
    assert dw.isnan().all()  # 0 * inf of windows that exist
    x[:, 0, 3] = 1
    x[32:48, 0, 3] = float("inf")  # covered by windows 1 and 2, not by window 0
    g[0] = 1
    g[1:] = 0
    _, dw = launch.backward(g[:1], x[:32], w, 32, 16, (32,))
    assert dw.isfinite().all()


@st.composite
def ragged_calls(draw):
    """Any segments and heads on few kernels: lengths, heads and strides are run-time arguments, and cost no compile."""
    lengths = draw(st.lists(st.integers(0, 150), min_size=1, max_size=12).filter(any))
    block, stride = draw(st.sampled_from([(32, 16), (48, 32), (16, 16)]))
    head_dim, dtype = draw(st.sampled_from([(16, torch.float32), (80, torch.bfloat16), (192, torch.float16)]))
    return tuple(lengths), draw(st.integers(1, 5)), head_dim, block, stride, dtype, draw(st.integers(0, 99))


@pytest.mark.usefixtures("one_thread")
@fuzzed(150)
@given(call=ragged_calls())
def test_any_ragged_batch(call, device):
    *shape, dtype, seed = call
    g, x, w, geometry = make(*shape, dtype, device, seed=seed)
    if len(g) == 0:
        return  # the operator returns before it launches
    block, stride = shape[3:]
    assert_accurate(launch.forward(x, w, *geometry), reference.forward, (x, w), geometry, 0, terms=block)
    dx, dw = launch.backward(g, x, w, *geometry)
    assert_accurate(dx, reference.backward, (g, x, w), geometry, 0, terms=-(-block // stride))
    assert_accurate(dw, reference.backward, (g, x, w), geometry, 1, terms=g.shape[0] * shape[2])
