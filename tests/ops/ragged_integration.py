"""Autograd, torch.compile and the registration of the attention ops on ragged batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor


class RaggedOp(NamedTuple):
    """How the tests that these ops share reach one of them. A problem is its NamedTuple `Problem`."""

    name: str
    function: Callable[..., Any]
    gradient: Callable[..., Any]
    problem: Callable[..., Any]  # of query tokens and key tokens of segments, if not its own, and a dtype
    own_arguments: Callable[[Any], dict[str, Any]]  # of a problem: what the functions take and the other ops do not
    given: Callable[[Any], dict[str, Tensor]]  # of a problem: output and statistics, as the gradient takes them
    random_grad: Callable[[Any], Tensor]

    def arguments(self, problem: Any, impl: str) -> dict[str, Any]:
        """The problem as a public call."""
        return {
            "query": problem.query,
            "key": problem.key,
            "value": problem.value,
            "scale_value": problem.scale,
            "head_num": problem.query.shape[1],
            "actual_seq_qlen": problem.query_ends,
            "actual_seq_kvlen": problem.key_ends,
            "impl": impl,
        } | self.own_arguments(problem)

    def __call__(self, problem: Any, impl: str) -> Any:
        return self.function(**self.arguments(problem, impl))

    def differentiable(self, *arguments: Any, **more: Any) -> Any:
        """A problem whose tensors require gradients."""
        problem = self.problem(*arguments, **more)
        for tensor in problem[:3]:
            tensor.requires_grad_()
        return problem


def detached(problem: Any) -> Any:
    return problem._replace(query=problem.query.detach(), key=problem.key.detach(), value=problem.value.detach())


class RaggedOperators:
    """An op says what it is and inherits these tests."""

    op: ClassVar[RaggedOp]

    @pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "Meta"])
    @pytest.mark.parametrize("suffix", ["", "_grad"])
    def test_operators_are_registered_for_every_kind_of_device(self, suffix, key):
        """PrivateUse1 is the NPU; it is registered by name, so that torch_npu need not be there."""
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa_triton::{self.op.name}{suffix}", key)


class RaggedImplementations:
    """These tests too, for each implementation: `impl` is a parameter of the class that inherits them."""

    op: ClassVar[RaggedOp]

    def test_autograd_gives_the_gradients_that_are_asked_for(self, impl):
        problem = self.op.differentiable()
        grad = self.op.random_grad(problem)
        expected = torch.autograd.grad(self.op(problem, impl)[0], problem[:3], grad)
        for wanted in range(3):
            tensors = [tensor.detach().requires_grad_(at == wanted) for at, tensor in enumerate(problem[:3])]
            one = problem._replace(query=tensors[0], key=tensors[1], value=tensors[2])
            self.op(one, impl)[0].backward(grad)
            for at, tensor in enumerate(tensors):
                assert (tensor.grad is not None) == (at == wanted)
            assert torch.equal(tensors[wanted].grad, expected[wanted])

    def test_only_the_output_has_a_gradient(self, impl):
        output, *statistics = self.op(self.op.differentiable(), impl)
        assert output.requires_grad
        for part in statistics:
            assert not part.requires_grad
            with pytest.raises(RuntimeError, match="does not require grad"):
                part.sum().backward()

    def test_no_graph_without_need(self, impl):
        problem = self.op.differentiable()
        with torch.no_grad():
            assert not self.op(problem, impl)[0].requires_grad
        with torch.inference_mode():
            self.op(problem, impl)
        assert not self.op(detached(problem), impl)[0].requires_grad

    def test_there_are_no_second_derivatives(self, impl):
        problem = self.op.differentiable()
        output = self.op(problem, impl)[0]
        grad = self.op.random_grad(problem)
        for given in (grad, grad.clone().requires_grad_()):
            gradients = torch.autograd.grad(output, problem[:3], given, create_graph=True, retain_graph=True)
            with pytest.raises(RuntimeError, match=r"create_graph: expected .* differentiable once"):
                gradients[0].sum().backward()
        parts = self.op.gradient(grad=grad, **self.op.arguments(problem, impl), **self.op.given(problem))
        assert not any(part.requires_grad for part in parts)

    def test_a_gradient_with_strides_of_zero(self, impl):
        """What .sum().backward() sends."""
        problem = self.op.differentiable()
        output = self.op(problem, impl)[0]
        expanded = torch.autograd.grad(output.sum(), problem[:3], retain_graph=True)
        dense = torch.autograd.grad(output, problem[:3], torch.ones_like(output))
        assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("kind", [list, tuple])
    def test_compile_takes_the_whole_public_function(self, impl, backend, kind):
        function = self.op.function

        def loss(query, **rest):
            output, *_, statistic = function(query * 2, **rest)
            return output.square().sum() + statistic.sum()

        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        compiled = torch.compile(loss, fullgraph=True, backend=counter)
        for queries, keys in (([9, 4], [40, 33]), ([9, 4], [40, 33]), ([7, 8], [50, 21]), ([3, 16], [17, 40])):
            problem = self.op.differentiable(queries, keys)
            arguments = self.op.arguments(problem, impl)
            arguments |= {name: kind(arguments[name]) for name in ("actual_seq_qlen", "actual_seq_kvlen")}
            actual = torch.autograd.grad(compiled(**arguments), problem[:3])
            expected = torch.autograd.grad(loss(**arguments), problem[:3])
            torch.testing.assert_close(actual, expected)
        assert counter.frame_count <= 3  # lengths become symbolic: one graph serves every list of two segments

    def test_results_repeat_bit_for_bit(self, impl):
        problem = self.op.differentiable([40, 20], [100, 70], torch.float16)

        def all_of_it():
            results = self.op(problem, impl)
            return *results, *torch.autograd.grad(results[0], problem[:3], torch.ones_like(results[0]))

        assert all(torch.equal(a, b) for a, b in zip(all_of_it(), all_of_it(), strict=True))
