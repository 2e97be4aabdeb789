"""Autograd, torch.compile, fake tensors and opcheck, on every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_triton.ops.select_attention import nsa_select_attention, nsa_select_attention_grad
from tests.ops.select_attention.cases import Sizes, ends_of, every_impl, make, random_grad, statistics

forward: Any = nsa_select_attention
direct: Any = nsa_select_attention_grad
SIZES = Sizes(heads=4, kv_heads=2, key_dim=16, value_dim=8, block=16, entries=3)
QUERIES, KEYS = [9, 0, 4], [40, 5, 33]


def problem_of(queries=QUERIES, keys=KEYS, dtype=torch.float32, **more) -> Any:
    problem = make(SIZES, queries, keys, dtype, **{"causal": True} | more)
    for tensor in problem[:3]:
        tensor.requires_grad_()
    return problem


def bound(impl, problem) -> Any:
    """The public function of query, key and value."""
    query_ends, key_ends = problem.query_ends, problem.key_ends

    def call(query, key, value):
        more: dict[str, Any] = {"actual_seq_qlen": query_ends, "actual_seq_kvlen": key_ends, "impl": impl}
        return nsa_select_attention(query, key, value, problem.ids, 0.25, 4, 16, 3, causal=problem.causal, **more)

    return call


@pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta"])
@pytest.mark.parametrize("op", ["select_attention", "select_attention_grad"])
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
    output, largest, total = bound(impl, problem)(*problem[:3])
    assert output.requires_grad
    assert not largest.requires_grad
    assert not total.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        largest.sum().backward()


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
    given = statistics(problem)
    ends: dict[str, Any] = {"actual_seq_qlen": problem.query_ends, "actual_seq_kvlen": problem.key_ends}
    parts = direct(grad, *problem[:3], *given, problem.ids, 0.25, 4, 16, 3, **ends, impl=impl)
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
    for causal in (False, True):
        problem = problem_of(causal=causal)
        rest = (*problem[4:], impl)
        torch.library.opcheck(ops.select_attention.default, (*problem[:4], *rest))
        tensors = [tensor.detach() for tensor in problem[:3]]
        arguments = (random_grad(problem), *tensors, *(part.detach() for part in statistics(problem)), problem.ids)
        torch.library.opcheck(ops.select_attention_grad.default, (*arguments, *rest))


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_compile_takes_the_whole_public_function(impl, backend, kind):
    def loss(query, key, value, ids, query_ends, key_ends):
        more: dict[str, Any] = {"actual_seq_qlen": query_ends, "actual_seq_kvlen": key_ends, "impl": impl}
        output, _, total = nsa_select_attention(query * 2, key, value, ids, 0.25, 4, 16, 3, causal=True, **more)
        return output.square().sum() + total.sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for queries, keys in (([9, 4], [40, 33]), ([9, 4], [40, 33]), ([7, 8], [50, 21]), ([3, 16], [17, 40])):
        problem = problem_of(queries, keys)
        arguments = (*problem[:4], kind(ends_of(queries)), kind(ends_of(keys)))
        actual = torch.autograd.grad(compiled(*arguments), problem[:3])
        expected = torch.autograd.grad(loss(*arguments), problem[:3])
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 3  # lengths become symbolic: one graph serves every list of two segments


def test_compile_of_the_gradient_function_and_of_masks():
    problem = problem_of()
    grad, given = random_grad(problem), statistics(problem)
    ends: dict[str, Any] = {"actual_seq_qlen": problem.query_ends, "actual_seq_kvlen": problem.key_ends}

    def step(grad, query, key, value, mask):
        more = ends | {"atten_mask": mask, "impl": "reference"}
        results = nsa_select_attention(query, key, value, problem.ids, 0.25, 4, 16, 3, **more)
        return *results, *direct(grad, query, key, value, *given, problem.ids, 0.25, 4, 16, 3, **more)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    query, key, value = (tensor.detach() for tensor in problem[:3])
    for mask in (None, torch.zeros(2, 2).bool()):
        actual = compiled(grad, query, key, value, mask)
        torch.testing.assert_close(actual, step(grad, query, key, value, mask))


def test_compiled_code_checks_values():
    def call(query, key, value, ids, query_ends, key_ends):
        more: dict[str, Any] = {"actual_seq_qlen": query_ends, "actual_seq_kvlen": key_ends, "impl": "reference"}
        return nsa_select_attention(query, key, value, ids, 0.25, 4, 16, 3, **more)[0]

    torch._dynamo.reset()
    compiled: Any = torch.compile(call, fullgraph=True, backend="eager")
    tensors: Any = problem_of([9, 4], [40, 33])[:4]
    assert compiled(*tensors, [9, 13], [40, 73]).shape == (13, 4, 8)
    for query_ends, key_ends in (([9, 14], [40, 73]), ([9, 13], [74, 73]), ([9, 13], [40, 74])):
        with pytest.raises(RuntimeError, match="actual_seq_"):
            compiled(*tensors, query_ends, key_ends)


def test_meta_and_fake_tensors():
    problem = problem_of(dtype=torch.bfloat16)
    more: dict[str, Any] = {"actual_seq_qlen": problem.query_ends, "actual_seq_kvlen": problem.key_ends}
    more |= {"impl": "triton", "causal": True}

    def both(tensors, ids, like):
        results = forward(*tensors, ids, 0.25, 4, 16, 3, **more)
        results = (*results, *direct(results[0], *tensors, *results, ids, 0.25, 4, 16, 3, **more))
        shapes = [(13, 4, 8), (13, 4, 8), (13, 4, 8), (13, 4, 16), (78, 2, 16), (78, 2, 8)]
        assert [tuple(result.shape) for result in results] == shapes
        half, single = torch.bfloat16, torch.float32
        assert [result.dtype for result in results] == [half, single, single, half, half, half]
        assert {result.device.type for result in results} == {like}

    both([tensor.detach().to("meta") for tensor in problem[:3]], problem.ids.to("meta"), "meta")
    tensors = [tensor.detach() for tensor in problem[:3]]
    with FakeTensorMode() as mode:
        both([mode.from_tensor(tensor) for tensor in tensors], mode.from_tensor(problem.ids), "cpu")


@every_impl
def test_results_repeat_bit_for_bit(impl):
    problem = problem_of([40, 20], [100, 70], torch.float16)

    def all_of_it():
        results = bound(impl, problem)(*problem[:3])
        return *results, *torch.autograd.grad(results[0], problem[:3], torch.ones_like(results[0]))

    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), all_of_it(), strict=True))
