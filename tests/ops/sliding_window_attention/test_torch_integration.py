"""Autograd, torch.compile, fake tensors and opcheck, on every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_triton.ops.sliding_window_attention import nsa_sliding_window_attention, nsa_sliding_window_attention_grad
from tests.ops.ragged_integration import RaggedImplementations, RaggedOp, RaggedOperators
from tests.ops.sliding_window_attention.cases import Sizes, every_impl, make, outputs_of, random_grad

forward: Any = nsa_sliding_window_attention
direct: Any = nsa_sliding_window_attention_grad
SIZES = Sizes(heads=4, kv_heads=2, key_dim=16, value_dim=8)
QUERIES, KEYS = [9, 0, 24], [40, 5, 13]
NUMBERS = (0.25, 4, 7)  # scale, heads, window


def problem_of(queries=QUERIES, keys=KEYS, dtype=torch.float32) -> Any:
    return make(SIZES, queries, keys, 7, dtype)


def lengths(problem) -> dict[str, Any]:
    return {"actual_seq_qlen": problem.query_ends, "actual_seq_kvlen": problem.key_ends}


OP = RaggedOp(
    "sliding_window_attention",
    forward,
    direct,
    problem_of,
    lambda problem: {"window_size": problem.window},
    lambda problem: dict(zip(("attention_out", "lse"), outputs_of(problem), strict=True)),
    random_grad,
)


class TestOperators(RaggedOperators):
    op = OP


@every_impl
class TestImplementations(RaggedImplementations):
    op = OP


@every_impl
def test_opcheck(impl):
    ops = torch.ops.nsa_triton
    problem = OP.differentiable()
    rest = (*problem[3:], impl)
    torch.library.opcheck(ops.sliding_window_attention.default, (*problem[:3], *rest))
    tensors = [tensor.detach() for tensor in (*problem[:3], *outputs_of(problem))]
    torch.library.opcheck(ops.sliding_window_attention_grad.default, (random_grad(problem), *tensors, *rest))


def test_compile_of_the_gradient_function():
    problem = OP.differentiable()
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
    tensors: Any = OP.differentiable([9, 4], [40, 33])[:3]
    assert compiled(*tensors, [9, 13], [40, 73], 4).shape == (13, 4, 8)
    for query_ends, key_ends in (([9, 14], [40, 73]), ([9, 13], [74, 73]), ([9, 13], [40, 74])):
        with pytest.raises(RuntimeError, match="actual_seq_"):
            compiled(*tensors, query_ends, key_ends, 4)
    with pytest.raises(Exception, match="head_num"):
        compiled(*tensors, [9, 13], [40, 73], 2)


def test_meta_and_fake_tensors():
    problem = OP.differentiable(dtype=torch.bfloat16)
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
