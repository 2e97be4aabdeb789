"""The kernels of gated_combine on every target that is present, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops._common.accuracy import judge
from nsa_triton.ops.gated_combine import reference
from nsa_triton.runtime.configs import overriding
from tests.dtypes import shapes_in_dtypes
from tests.fuzzing import fuzzed
from tests.ops.gated_combine.cases import make

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

from nsa_triton.ops.gated_combine import launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# tokens, heads, head size: tails of rows and of columns, one row, several blocks of columns
SHAPES = [(70, 4, 128), (333, 5, 80), (1, 1, 16), (129, 1, 192), (200, 16, 64), (7, 3, 33), (50, 2, 1), (19, 2, 520)]
OWN = [BF16, FP16, FP32, BF16, FP16, FP32, FP32, BF16]  # dtype of each
each_shape = shapes_in_dtypes(SHAPES, OWN, SHAPES[1])


def inputs_on(device, shape, dtype, gates=None, seed=0):
    tokens, heads, value_dim = shape
    grad, inputs = make((tokens,), heads, value_dim, dtype, gates, seed)
    return grad.to(device), tuple(tensor.to(device) for tensor in inputs)


def assert_accurate(actual, call, inputs, terms):
    eager, expected = call(*inputs), call(*(tensor.double() for tensor in inputs))
    eager, expected = ((eager,), (expected,)) if isinstance(eager, torch.Tensor) else (eager, expected)
    for ours, theirs, truth, count in zip(actual, eager, expected, terms, strict=True):
        accuracy = judge(ours, theirs, truth, terms=count)
        assert accuracy.ok, accuracy


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gates", [None, FP32], ids=("gates alike", "gates float32"))
@each_shape
def test_forward_is_as_accurate_as_eager(shape, dtype, gates, device):
    _, inputs = inputs_on(device, shape, dtype, gates)
    output = launch.forward(*inputs)
    assert output.dtype == dtype
    assert_accurate((output,), reference.forward, inputs, terms=(3,))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gates", [None, FP32], ids=("gates alike", "gates float32"))
@each_shape
def test_gradients_are_as_accurate_as_eager(shape, dtype, gates, device):
    grad, inputs = inputs_on(device, shape, dtype, gates)
    actual = launch.backward(grad, *inputs)
    assert [tensor.dtype for tensor in actual] == [tensor.dtype for tensor in inputs]
    assert_accurate(actual, reference.backward, (grad, *inputs), terms=(1, 1, 1, shape[2]))


def both(grad, inputs):
    return (launch.forward(*inputs), *launch.backward(grad, *inputs))


def test_results_are_bit_identical_on_repeat_and_with_any_number_of_threads(device):
    grad, inputs = inputs_on(device, (300, 7, 128), BF16)
    once = both(grad, inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(once, both(grad, inputs), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_the_bits_do_not_depend_on_the_rows_of_a_tile(device):
    grad, inputs = inputs_on(device, (100, 3, 64), FP16)
    once = both(grad, inputs)
    tiles = {"BR": 16, "BD": 64}
    with overriding("gated_combine_fwd", tiles), overriding("gated_combine_bwd", tiles):
        again = both(grad, inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def padded(tensor):
    """Rows with a gap between them, full of NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 16), float("nan"))
    return wide[..., 16:].copy_(tensor)


def turned(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def of_heads(tensor):
    """[T, N, D] as attention kernels leave it: [N, T, D] in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("change", [padded, turned, of_heads])
def test_strided_inputs_give_the_bits_of_dense_ones(change, device):
    grad, inputs = inputs_on(device, (90, 3, 64), FP16)
    strided = both(change(grad), [change(tensor) for tensor in inputs])
    assert all(torch.equal(a, b) for a, b in zip(both(grad, inputs), strided, strict=True))


def test_padded_rows_and_gates_with_the_branch_first_are_not_copied(device):
    _, inputs = inputs_on(device, (90, 3, 64), FP16)
    rows = padded(inputs[0])
    assert launch.rows_of(rows).data_ptr() == rows.data_ptr()
    gates = torch.randn(3, 90, 3, device=device)
    assert launch.branch_major(gates.permute(1, 2, 0)).data_ptr() == gates.data_ptr()


@pytest.mark.parametrize("dim", [(0,), (0, 1), (0, 1, 2)], ids=str)
def test_expanded_inputs_give_the_bits_of_dense_ones(dim, device):
    """What .sum().backward() sends has strides of zero."""
    grad, inputs = inputs_on(device, (90, 3, 64), FP16)
    shape = [1 if at in dim else size for at, size in enumerate(grad.shape)]
    grad = torch.randn(shape).half().to(device).expand(grad.shape)
    inputs = (inputs[0][:1].expand(inputs[0].shape), *inputs[1:])
    copies = [tensor.contiguous() for tensor in inputs]
    dense = both(grad.contiguous(), copies)
    assert all(torch.equal(a, b) for a, b in zip(dense, both(grad, inputs), strict=True))


@st.composite
def calls(draw):
    """Any tokens and heads on few kernels: these and strides are run-time arguments, and cost no compile."""
    value_dim, dtype = draw(st.sampled_from([(16, FP32), (80, BF16), (192, FP16)]))
    gates = draw(st.sampled_from([dtype, FP32]))
    return (draw(st.integers(1, 300)), draw(st.integers(1, 6)), value_dim), dtype, gates, draw(st.integers(0, 99))


@pytest.mark.usefixtures("one_thread")
@fuzzed(80)
@given(call=calls())
def test_any_call(call, device):
    shape, dtype, gates, seed = call
    grad, inputs = inputs_on(device, shape, dtype, gates, seed)
    assert_accurate((launch.forward(*inputs),), reference.forward, inputs, terms=(3,))
    terms = (1, 1, 1, shape[2])
    assert_accurate(launch.backward(grad, *inputs), reference.backward, (grad, *inputs), terms)
