"""Autograd, torch.compile, fake tensors and opcheck, on every implementation."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from nsa_triton import npu_nsa_compress, npu_nsa_compress_grad, nsa_compress, nsa_compress_grad
from tests.ops.compress.cases import dense, dense_grad, every_impl, make

BLOCK, STRIDE = 32, 16
LENGTHS = [40, 0, 20, 70]
ROWS = 1 + 3


def leaves(lengths=LENGTHS, dtype=torch.float32):
    input, weight, ends = make(lengths, block=BLOCK, dtype=dtype)
    return input.requires_grad_(), weight.requires_grad_(), ends


def bound(impl, ends):
    return functools.partial(
        npu_nsa_compress, compress_block_size=BLOCK, compress_stride=STRIDE, actual_seq_len=ends, impl=impl
    )


@every_impl
@pytest.mark.parametrize("wanted", ["both", "input", "weight"])
def test_autograd_gives_the_gradients_that_are_asked_for(impl, wanted):
    input, weight, ends = leaves()
    input.requires_grad_(wanted != "weight")
    weight.requires_grad_(wanted != "input")
    output = bound(impl, ends)(input, weight)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected = dense_grad(grad, input, weight, STRIDE, ends)
    for tensor, exact in zip((input, weight), expected, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad.double(), exact, rtol=1e-5, atol=1e-4)
        else:
            assert tensor.grad is None


@every_impl
def test_the_gradient_function_is_what_autograd_calls(impl):
    input, weight, ends = leaves()
    output = nsa_compress(input, weight, BLOCK, STRIDE, actual_seq_len=ends, impl=impl)
    grad = torch.randn_like(output)
    output.backward(grad)
    with torch.no_grad():
        direct = nsa_compress_grad(grad, input, weight, BLOCK, STRIDE, actual_seq_len=ends, impl=impl)
    assert torch.equal(direct[0], input.grad)
    assert torch.equal(direct[1], weight.grad)


@pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta", "Autograd"])
@pytest.mark.parametrize("op", ["compress", "compress_grad"])
def test_operators_are_registered_for_every_kind_of_device(op, key):
    """PrivateUse1 is the NPU; it is registered by name, so that torch_npu need not be there."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa_triton::{op}", key)


@every_impl
def test_no_graph_without_need(impl):
    input, weight, ends = leaves()
    with torch.no_grad():
        assert not bound(impl, ends)(input, weight).requires_grad
    with torch.inference_mode():
        bound(impl, ends)(input, weight)
    assert not bound(impl, ends)(input.detach(), weight.detach()).requires_grad


@every_impl
def test_second_derivatives(impl):
    """The operator is bilinear, so the derivative of its gradient is known: d/dw of <v, grad_x> is grad_w of (g, v)."""
    input, weight, ends = leaves()
    output = bound(impl, ends)(input, weight)
    grad = torch.randn_like(output)
    (input_grad,) = torch.autograd.grad(output, input, grad, create_graph=True)
    direction = torch.randn_like(input)
    (second,) = torch.autograd.grad(input_grad, weight, direction)
    expected = dense_grad(grad, direction, weight, STRIDE, ends)[1]
    torch.testing.assert_close(second.double(), expected, rtol=1e-5, atol=1e-4)


def strided(tensor):
    wide = torch.full((*tensor.shape[:-1], 3 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
    view = wide[..., 1::3]
    return view.copy_(tensor)


@every_impl
def test_any_strides(impl):
    input, weight, ends = make(LENGTHS, block=BLOCK)
    expected = bound(impl, ends)(input, weight)
    grad = torch.randn(1, 1, 1).expand(ROWS, *input.shape[1:])  # what .sum().backward() sends: strides of zero
    expected_grads = npu_nsa_compress_grad(
        grad.contiguous(), input, weight, BLOCK, STRIDE, actual_seq_len=ends, impl=impl
    )
    for change in (strided, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
        other_input, other_weight = change(input).requires_grad_(), change(weight).requires_grad_()
        output = bound(impl, ends)(other_input, other_weight)
        assert output.is_contiguous()
        torch.testing.assert_close(output, expected)
        grads = torch.autograd.grad(output, (other_input, other_weight), grad)
        torch.testing.assert_close(grads, expected_grads)


@every_impl
@pytest.mark.parametrize("lengths", [[31], [5, 0, 31, 16], [0, 0], [0]], ids=str)
def test_no_window_gives_no_rows_and_zero_gradients(impl, lengths):
    input, weight, ends = leaves(lengths)
    output = bound(impl, ends)(input, weight)
    assert output.shape == (0, *input.shape[1:])
    assert output.dtype == input.dtype
    output.sum().backward()
    assert torch.equal(input.grad, torch.zeros_like(input))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@every_impl
def test_opcheck(impl):
    for lengths in (LENGTHS, [31]):
        input, weight, ends = leaves(lengths)
        rest = (BLOCK, STRIDE, ends, impl)
        torch.library.opcheck(torch.ops.nsa_triton.compress.default, (input, weight, *rest))
        grad = torch.ones_like(bound(impl, ends)(input, weight)).detach().requires_grad_()
        torch.library.opcheck(torch.ops.nsa_triton.compress_grad.default, (grad, input, weight, *rest))


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_compile_takes_the_whole_public_function(impl, backend, kind):
    def loss(input, weight, ends):
        return nsa_compress(input * 2, weight, BLOCK, STRIDE, actual_seq_len=ends, impl=impl).square().sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for lengths in ([40, 20, 70], [40, 20, 70], [50, 80], [64, 66], [33, 97]):
        input, weight, ends = leaves(lengths)
        actual = torch.autograd.grad(compiled(input, weight, kind(ends)), (input, weight))
        expected = torch.autograd.grad(loss(input, weight, ends), (input, weight))
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 3  # lengths become symbolic: one graph serves every list of two segments


def test_compile_checks_values():
    def call(input, weight, ends):
        return nsa_compress(input, weight, BLOCK, STRIDE, actual_seq_len=ends, impl="reference")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    input, weight, ends = leaves([40, 20])
    assert compiled(input, weight, ends).shape[0] == 1
    for bad in ([40, 61], [70, 60], [40, 59]):
        with pytest.raises(RuntimeError, match="actual_seq_len"):
            compiled(input, weight, bad)


def test_meta_and_fake_tensors():
    input, weight, ends = leaves(dtype=torch.bfloat16)
    output = bound("triton", ends)(input.to("meta"), weight.to("meta"))
    assert output.device.type == "meta"
    assert output.shape == (ROWS, *input.shape[1:])
    assert output.dtype == torch.bfloat16
    with FakeTensorMode():
        fake, fake_weight = torch.empty(130, 2, 16), torch.empty(BLOCK, 2)
        output = bound("triton", ends)(fake, fake_weight)
        grads = npu_nsa_compress_grad(output, fake, fake_weight, BLOCK, STRIDE, actual_seq_len=ends, impl="triton")
    assert output.shape == (ROWS, 2, 16)
    assert [grad.shape for grad in grads] == [fake.shape, fake_weight.shape]


def test_symbolic_tracing_of_shapes():
    input, weight, ends = make(LENGTHS, block=BLOCK)
    graph = make_fx(bound("reference", ends), tracing_mode="symbolic")(input, weight)
    torch.testing.assert_close(graph(input, weight).double(), dense(input, weight, STRIDE, ends), rtol=1e-5, atol=1e-4)


@every_impl
def test_results_repeat_bit_for_bit(impl):
    input, weight, ends = leaves([200, 33, 150], dtype=torch.float16)

    def all_of_it():
        output = bound(impl, ends)(input, weight)
        return output, *torch.autograd.grad(output, (input, weight), torch.ones_like(output))

    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), all_of_it(), strict=True))
