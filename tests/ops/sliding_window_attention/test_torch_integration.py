"""Autograd, torch.compile, fake tensors and opcheck, on every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_triton.ops.sliding_window_attention import nsa_sliding_window_attention, nsa_sliding_window_attention_grad
from tests.ops.sliding_window_attention.cases import Sizes, ends_of, every_impl, make, outputs_of, random_grad

forward: Any = nsa_sliding_window_attention
direct: Any = nsa_sliding_window_attention_grad
SIZES = Sizes(heads=4, kv_heads=2, key_dim=16, value_dim=8)
QUERIES, KEYS = [9, 0, 24], [40, 5, 13]
NUMBERS = (0.25, 4, 7)  # scale, heads, window


def problem_of(queries=QUERIES, keys=KEYS, dtype=torch.float32) -> Any:
    problem = make(SIZES, queries, keys, 7, dtype)
    for tensor in problem[:3]:
        tensor.requires_grad_()
    return problem


def lengths(problem) -> dict[str, Any]:
    return {"actual_seq_qlen": problem.query_ends, "actual_seq_kvlen": problem.key_ends}


def bound(impl, problem) -> Any:
    """The public function of query, key and value."""

    def call(query, key, value):
        return forward(query, key, value, *NUMBERS, **lengths(problem), impl=impl)

    return call


@pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta"])
@pytest.mark.parametrize("op", ["sliding_window_attention", "sliding_window_attention_grad"])
def test_operators_are_registered_for_every_kind_of_device(op, key):
    """PrivateUse1 is the NPU; it is registered by name, so that torch_npu need not be there."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa_triton::{op}", key)


@every_impl
def test_autograd_gives_the_gradients_that_are_asked_for(impl):
    problem = problem_of()
    grad = random_grad(problem)
    expected = torch.autograd.grad(bound(impl, problem)(*problem[:3])[0], problem[:3], grad)
    for wanted in range(3):
        tensors = [tensor.detach().requires_grad_(at == wanted) for at, tensor in enumerate(problem[:3])]
        bound(impl, problem)(*tensors)[0].backward(grad)
        for at, tensor in enumerate(tensors):
            assert (tensor.grad is not None) == (at == wanted)
        assert torch.equal(tensors[wanted].grad, expected[wanted])


@every_impl
def test_only_the_output_has_a_gradient(impl):
    problem = problem_of()
    output, lse = bound(impl, problem)(*problem[:3])
    assert output.requires_grad
    assert not lse.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()


@every_impl
def test_no_graph_without_need(impl):
    problem = problem_of()
    with torch.no_grad():
        assert not bound(impl, problem)(*problem[:3])[0].requires_grad
    with torch.inference_mode():
        bound(impl, problem)(*problem[:3])
    assert not bound(impl, problem)(*(tensor.detach() for tensor in problem[:3]))[0].requires_grad


@every_impl
def test_there_are_no_second_derivatives(impl):
    problem = problem_of()
    output = bound(impl, problem)(*problem[:3])[0]
    grad = random_grad(problem).requires_grad_()
    gradients = torch.autograd.grad(output, problem[:3], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()
    parts = direct(grad, *problem[:3], *outputs_of(problem), *NUMBERS, **lengths(problem), impl=impl)
    assert not any(part.requires_grad for part in parts)


@every_impl
def test_a_gradient_with_strides_of_zero(impl):
    """What .sum().backward() sends."""
    problem = problem_of()
    output = bound(impl, problem)(*problem[:3])[0]
    expanded = torch.autograd.grad(output.sum(), problem[:3], retain_graph=True)
    dense = torch.autograd.grad(output, problem[:3], torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@every_impl
def test_opcheck(impl):
    ops = torch.ops.nsa_triton
    problem = problem_of()
    rest = (*problem[3:], impl)
    torch.library.opcheck(ops.sliding_window_attention.default, (*problem[:3], *rest))
    tensors = [tensor.detach() for tensor in (*problem[:3], *outputs_of(problem))]
    torch.library.opcheck(ops.sliding_window_attention_grad.default, (random_grad(problem), *tensors, *rest))


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_compile_takes_the_whole_public_function(impl, backend, kind):
    def loss(query, key, value, query_ends, key_ends):
        more: dict[str, Any] = {"actual_seq_qlen": query_ends, "actual_seq_kvlen": key_ends, "impl": impl}
        output, lse = forward(query * 2, key, value, *NUMBERS, **more)
        return output.square().sum() + lse[-1].sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for queries, keys in (([9, 4], [40, 33]), ([9, 4], [40, 33]), ([7, 8], [50, 21]), ([3, 16], [17, 40])):
        problem = problem_of(queries, keys)
        arguments = (*problem[:3], kind(ends_of(queries)), kind(ends_of(keys)))
        actual = torch.autograd.grad(compiled(*arguments), problem[:3])
        expected = torch.autograd.grad(loss(*arguments), problem[:3])
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 3  # lengths become symbolic: one graph serves every list of two segments


def test_compile_of_the_gradient_function():
    problem = problem_of()
    grad, given = random_grad(problem), outputs_of(problem)
    more: dict[str, Any] = {**lengths(problem), "impl": "reference"}

    def step(grad, query, key, value):
        results = forward(query, key, value, *NUMBERS, **more)
        return *results, *direct(grad, query, key, value, *given, *NUMBERS, **more)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tensors = [tensor.detach() for tensor in problem[:3]]
    torch.testing.assert_close(compiled(grad, *tensors), step(grad, *tensors))


def test_compiled_code_checks_values():
    def call(query, key, value, query_ends, key_ends, heads):
        more: dict[str, Any] = {"actual_seq_qlen": query_ends, "actual_seq_kvlen": key_ends, "impl": "reference"}
        return forward(query, key, value, 0.25, heads, 7, **more)[0]

    torch._dynamo.reset()
    compiled: Any = torch.compile(call, fullgraph=True, backend="eager")
    tensors: Any = problem_of([9, 4], [40, 33])[:3]
    assert compiled(*tensors, [9, 13], [40, 73], 4).shape == (13, 4, 8)
    for query_ends, key_ends in (([9, 14], [40, 73]), ([9, 13], [74, 73]), ([9, 13], [40, 74])):
        with pytest.raises(RuntimeError, match="actual_seq_"):
            compiled(*tensors, query_ends, key_ends, 4)
    with pytest.raises(Exception, match="head_num"):
        compiled(*tensors, [9, 13], [40, 73], 2)


def test_meta_and_fake_tensors():
    problem = problem_of(dtype=torch.bfloat16)
    more: dict[str, Any] = {**lengths(problem), "impl": "triton"}

    def both(tensors, like):
        results = forward(*tensors, *NUMBERS, **more)
        results = (*results, *direct(results[0], *tensors, *results, *NUMBERS, **more))
        shapes = [(33, 4, 8), (33, 4), (33, 4, 16), (58, 2, 16), (58, 2, 8)]
        assert [tuple(result.shape) for result in results] == shapes
        half, single = torch.bfloat16, torch.float32
        assert [result.dtype for result in results] == [half, single, half, half, half]
        assert {result.device.type for result in results} == {like}

    both([tensor.detach().to("meta") for tensor in problem[:3]], "meta")
    tensors = [tensor.detach() for tensor in problem[:3]]
    with FakeTensorMode() as mode:
        both([mode.from_tensor(tensor) for tensor in tensors], "cpu")


@every_impl
def test_results_repeat_bit_for_bit(impl):
    problem = problem_of([40, 20], [100, 70], torch.float16)

    def all_of_it():
        results = bound(impl, problem)(*problem[:3])
        return *results, *torch.autograd.grad(results[0], problem[:3], torch.ones_like(results[0]))

    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), all_of_it(), strict=True))
