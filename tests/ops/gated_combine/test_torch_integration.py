"""Autograd, torch.compile, fake tensors and opcheck, on every implementation."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from nsa_triton import nsa_gated_combine, nsa_gated_combine_grad
from tests.ops.gated_combine.cases import dense, dense_grad, every_impl, make

NAMES = ("compressed", "selected", "local", "gates")


def leaves(*arguments, **named):
    grad, inputs = make(*arguments, **named)
    return grad, tuple(tensor.requires_grad_() for tensor in inputs)


@every_impl
@pytest.mark.parametrize("wanted", ["all", *NAMES])
def test_autograd_gives_the_gradients_that_are_asked_for(impl, wanted):
    grad, inputs = make()
    for name, tensor in zip(NAMES, inputs, strict=True):
        tensor.requires_grad_(wanted in ("all", name))
    nsa_gated_combine(*inputs, impl=impl).backward(grad)
    for tensor, exact in zip(inputs, dense_grad(grad, *inputs), strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad.double(), exact, rtol=1e-5, atol=1e-4)


@every_impl
@pytest.mark.parametrize("gates", [torch.bfloat16, torch.float32], ids=str)
def test_the_gradient_function_is_what_autograd_calls(gates, impl):
    grad, inputs = leaves(dtype=torch.bfloat16, gates=gates)
    nsa_gated_combine(*inputs, impl=impl).backward(grad)
    with torch.no_grad():
        direct = nsa_gated_combine_grad(grad, *inputs, impl=impl)
    for tensor, other in zip(inputs, direct, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert torch.equal(tensor.grad, other)


@pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta"])
@pytest.mark.parametrize("op", ["gated_combine", "gated_combine_grad"])
def test_operators_are_registered_for_every_kind_of_device(op, key):
    """PrivateUse1 is the NPU; it is registered by name, so that torch_npu need not be there."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa_triton::{op}", key)


@every_impl
def test_no_graph_without_need(impl):
    _, inputs = leaves()
    with torch.no_grad():
        assert not nsa_gated_combine(*inputs, impl=impl).requires_grad
    with torch.inference_mode():
        nsa_gated_combine(*inputs, impl=impl)
    assert not nsa_gated_combine(*(tensor.detach() for tensor in inputs), impl=impl).requires_grad


@every_impl
def test_it_is_differentiable_once(impl):
    grad, inputs = leaves()
    output = nsa_gated_combine(*inputs, impl=impl)
    for given in (grad, grad.clone().requires_grad_()):
        (of_gates,) = torch.autograd.grad(output, inputs[3], given, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"create_graph: expected .* differentiable once"):
            of_gates.sum().backward()


@every_impl
@pytest.mark.parametrize("leading", [(), (0,), (5, 0), (2, 9), (2, 3, 4)], ids=str)
def test_any_leading_dimensions(impl, leading):
    grad, inputs = leaves(leading, heads=2, value_dim=48)
    output = nsa_gated_combine(*inputs, impl=impl)
    assert output.shape == (*leading, 2, 48)
    output.backward(grad)
    torch.testing.assert_close(output.double(), dense(*inputs), rtol=1e-5, atol=1e-5)
    for tensor, exact in zip(inputs, dense_grad(grad, *inputs), strict=True):
        torch.testing.assert_close(tensor.grad.double(), exact, rtol=1e-5, atol=1e-4)


@every_impl
@pytest.mark.parametrize("turn", [(0, 1), (0, 3), (1, 2)], ids=str)
def test_results_are_contiguous_whatever_the_strides(turn, impl):
    grad, inputs = make((4, 9), heads=3, value_dim=32)
    strided = [tensor.transpose(*turn).contiguous().transpose(*turn) for tensor in (grad, *inputs)]
    expected = (nsa_gated_combine(*inputs, impl=impl), *nsa_gated_combine_grad(grad, *inputs, impl=impl))
    actual = (nsa_gated_combine(*strided[1:], impl=impl), *nsa_gated_combine_grad(*strided, impl=impl))
    for one, other in zip(actual, expected, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)  # PyTorch's sigmoid depends on strides


@every_impl
def test_opcheck(impl):
    for named in ({}, {"leading": (2, 5)}, {"leading": (0,)}, {"gates": torch.float32, "dtype": torch.bfloat16}):
        grad, inputs = leaves(**named)
        torch.library.opcheck(torch.ops.nsa_triton.gated_combine.default, (*inputs, impl))
        inputs = tuple(tensor.detach() for tensor in inputs)
        torch.library.opcheck(torch.ops.nsa_triton.gated_combine_grad.default, (grad, *inputs, impl))


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_takes_the_whole_public_function(impl, backend):
    def loss(*inputs):
        return nsa_gated_combine(*(2 * tensor for tensor in inputs), impl=impl).square().sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for tokens in (40, 40, 50, 77, 33):
        _, inputs = leaves((tokens,))
        actual = torch.autograd.grad(compiled(*inputs), inputs)
        torch.testing.assert_close(actual, torch.autograd.grad(loss(*inputs), inputs))
    assert counter.frame_count <= 2  # the number of tokens becomes symbolic


def test_compiled_calls_are_checked_too():
    def call(*inputs):
        return nsa_gated_combine(*inputs, impl="reference")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    _, inputs = make()
    assert compiled(*inputs).shape == inputs[0].shape
    with pytest.raises(RuntimeError, match="gates"):
        compiled(*inputs[:3], inputs[3][..., :2])


def test_meta_and_fake_tensors():
    grad, inputs = make(dtype=torch.bfloat16, gates=torch.float32)
    output = nsa_gated_combine(*(tensor.to("meta") for tensor in inputs), impl="triton")
    assert output.device.type == "meta"
    assert (output.shape, output.dtype) == (grad.shape, torch.bfloat16)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
        grads = nsa_gated_combine_grad(nsa_gated_combine(*fakes, impl="triton"), *fakes, impl="triton")
    assert [(one.shape, one.dtype) for one in grads] == [(one.shape, one.dtype) for one in inputs]


def test_symbolic_tracing_of_shapes():
    _, inputs = make()
    graph = make_fx(lambda *tensors: nsa_gated_combine(*tensors, impl="reference"), tracing_mode="symbolic")(*inputs)
    torch.testing.assert_close(graph(*inputs).double(), dense(*inputs), rtol=1e-5, atol=1e-5)


@every_impl
def test_results_repeat_bit_for_bit(impl):
    grad, inputs = leaves((200,), dtype=torch.float16)

    def all_of_it():
        output = nsa_gated_combine(*inputs, impl=impl)
        return output, *torch.autograd.grad(output, inputs, grad)

    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), all_of_it(), strict=True))
