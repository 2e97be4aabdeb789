"""Autograd, torch.compile, fake tensors and opcheck, on every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_triton.ops.select_attention import nsa_select_attention, nsa_select_attention_grad
from tests.ops.ragged_integration import RaggedImplementations, RaggedOp, RaggedOperators
from tests.ops.select_attention.cases import Sizes, every_impl, make, random_grad, statistics

forward: Any = nsa_select_attention
direct: Any = nsa_select_attention_grad
SIZES = Sizes(heads=4, kv_heads=2, key_dim=16, value_dim=8, block=16, entries=3)
QUERIES, KEYS = [9, 0, 4], [40, 5, 33]


def problem_of(queries=QUERIES, keys=KEYS, dtype=torch.float32, **more) -> Any:
    return make(SIZES, queries, keys, dtype, **{"causal": True} | more)


def own_arguments(problem) -> dict[str, Any]:
    sizes = {"select_block_size": problem.block, "select_block_count": problem.ids.shape[2]}
    return {"topk_indices": problem.ids, "causal": problem.causal, **sizes}


OP = RaggedOp(
    "select_attention",
    forward,
    direct,
    problem_of,
    own_arguments,
    lambda problem: dict(zip(("attention_out", "softmax_max", "softmax_sum"), statistics(problem), strict=True)),
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
    for causal in (False, True):
        problem = OP.differentiable(causal=causal)
        rest = (*problem[4:], impl)
        torch.library.opcheck(ops.select_attention.default, (*problem[:4], *rest))
        tensors = [tensor.detach() for tensor in problem[:3]]
        arguments = (random_grad(problem), *tensors, *(part.detach() for part in statistics(problem)), problem.ids)
        torch.library.opcheck(ops.select_attention_grad.default, (*arguments, *rest))


def test_compile_of_the_gradient_function_and_of_masks():
    problem = OP.differentiable()
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
    tensors: Any = OP.differentiable([9, 4], [40, 33])[:4]
    assert compiled(*tensors, [9, 13], [40, 73]).shape == (13, 4, 8)
    for query_ends, key_ends in (([9, 14], [40, 73]), ([9, 13], [74, 73]), ([9, 13], [40, 74])):
        with pytest.raises(RuntimeError, match="actual_seq_"):
            compiled(*tensors, query_ends, key_ends)


def test_meta_and_fake_tensors():
    problem = OP.differentiable(dtype=torch.bfloat16)
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
