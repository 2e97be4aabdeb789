"""The specification against a second formula, and what it says of extreme gates."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton import nsa_gated_combine, nsa_gated_combine_grad
from nsa_triton.ops._common import implementation
from nsa_triton.ops.gated_combine import reference
from tests.fuzzing import fuzzed
from tests.ops.gated_combine.cases import dense, dense_grad, every_impl, make

LEADING = [(50,), (2, 7), (), (2, 3, 4)]


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_reference_is_the_dense_formula(leading):
    grad, inputs = make(leading, heads=5, value_dim=24, dtype=torch.float64)
    torch.testing.assert_close(reference.forward(*inputs), dense(*inputs), rtol=1e-12, atol=1e-12)
    actual = reference.backward(grad, *inputs)
    torch.testing.assert_close(actual, dense_grad(grad, *inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gates", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_computes_in_float32_and_rounds_once(dtype, gates):
    grad, inputs = make((200,), value_dim=64, dtype=dtype, gates=gates)
    output = nsa_gated_combine(*inputs, impl="reference")
    assert output.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(output.double(), dense(*inputs), rtol=half + 5e-7, atol=1e-5)
    actual = nsa_gated_combine_grad(grad, *inputs, impl="reference")
    assert [tensor.dtype for tensor in actual] == [tensor.dtype for tensor in inputs]
    for ours, exact in zip(actual, dense_grad(grad, *inputs), strict=True):
        half = torch.finfo(ours.dtype).eps / 2
        torch.testing.assert_close(ours.double(), exact, rtol=half + 1e-5, atol=1e-4)


def test_gradcheck():
    _, inputs = make((3, 2), heads=2, value_dim=5, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *tensors: nsa_gated_combine(*tensors, impl="reference"), leaves)


def turn(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


@fuzzed(200)
@given(
    leading=st.lists(st.integers(0, 9), max_size=3),
    heads=st.integers(1, 5),
    value_dim=st.integers(1, 40),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    wide_gates=st.booleans(),
    turned=st.booleans(),
)
def test_any_legal_call_is_the_dense_formula(leading, heads, value_dim, dtype, wide_gates, turned):
    grad, inputs = make(tuple(leading), heads, value_dim, dtype, torch.float32 if wide_gates else dtype)
    if turned:
        grad, inputs = turn(grad), tuple(map(turn, inputs))
    output = nsa_gated_combine(*inputs, impl="reference")
    assert output.shape == grad.shape
    results = (output, *nsa_gated_combine_grad(grad, *inputs, impl="reference"))
    for actual, expected in zip(results, (dense(*inputs), *dense_grad(grad, *inputs)), strict=True):
        eps = torch.finfo(actual.dtype).eps
        bound = 2e-4 if torch.float32 in (dtype, actual.dtype) or eps > 1e-10 else 1e-10
        torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=bound)


@every_impl
def test_a_gate_lets_all_or_nothing_through(impl):
    _, (compressed, selected, local, gates) = make((64,), value_dim=32)
    gates[..., 0], gates[..., 1], gates[..., 2] = 200.0, -200.0, float("-inf")
    output = nsa_gated_combine(compressed, selected, local, gates, impl=impl)
    assert torch.equal(output, compressed)


@every_impl
@pytest.mark.parametrize("logit", [20.0, -20.0, 60.0, -60.0])
def test_the_gradient_of_a_large_gate_is_small_and_exact(logit, impl):
    """1 - sigmoid(20) has no digit left in float32."""
    grad, (compressed, selected, local, gates) = make((64,), value_dim=32)
    gates[...] = logit
    *_, actual = nsa_gated_combine_grad(grad, compressed, selected, local, gates, impl=impl)
    slope = torch.sigmoid(gates.double()) * torch.sigmoid(-gates.double())
    exact = slope * torch.stack([(grad.double() * x.double()).sum(-1) for x in (compressed, selected, local)], -1)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=float(slope.max()) * 1e-5)
    assert actual.abs().max() > 0


@every_impl
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_bad_value_spoils_its_element_and_no_other(bad, impl):
    grad, inputs = make((70,), value_dim=32)
    clean = nsa_gated_combine(*inputs, impl=impl)
    inputs[1][33, 1, 7] = bad
    dirty = nsa_gated_combine(*inputs, impl=impl)
    spoiled = torch.zeros_like(clean, dtype=torch.bool)
    spoiled[33, 1, 7] = True
    assert torch.equal(~dirty.isfinite(), spoiled)
    assert torch.equal(dirty[~spoiled], clean[~spoiled])
    *branch_grads, gates_grad = nsa_gated_combine_grad(grad, *inputs, impl=impl)
    assert all(tensor.isfinite().all() for tensor in branch_grads)
    assert torch.equal((~gates_grad.isfinite()).nonzero(), torch.tensor([[33, 1, 1]]))


def test_auto_takes_the_reference_for_float64_and_says_so_once(caplog):
    implementation._say_once.cache_clear()
    _, inputs = make(dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="nsa_triton"):
        for _ in range(3):
            output = nsa_gated_combine(*inputs)
    torch.testing.assert_close(output, dense(*inputs))
    assert [record.name for record in caplog.records] == ["nsa_triton"]
    assert "float64" in caplog.text
