"""The calls of torch_npu, made to nsa_triton.vendor, whose functions have the same arguments: names and numbers."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from bench.gate import gate
from bench.providers import call_of
from bench.vendor import vendor_call
from nsa_triton.ops.catalog import FAMILIES
from nsa_triton.vendor import npu
from nsa_triton.workloads import OPS, Shape, workload

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Shape("tiny", 4, 2, 64, 32, count=4)
REFERENCE = SimpleNamespace(
    **{name: functools.partial(vars(npu)[name], impl="reference") for name in vars(npu) if name.startswith("npu_nsa")}
)
WITHOUT = {op.name for family in FAMILIES for op in family.ops if op.vendor == "–"}


@pytest.mark.parametrize("op", [op for op in OPS if op not in WITHOUT])
def test_vendor_calls_pass_the_gate(op):
    work = workload(op, TINY, 160, batch=2)
    call = vendor_call(work, REFERENCE)
    assert call is not None
    assert gate(work).worst(call()).ok


@pytest.mark.parametrize("op", OPS)
def test_an_operator_that_torch_npu_lacks_is_no_error(op):
    assert vendor_call(workload(op, TINY, 160, filled=False), SimpleNamespace()) is None
    assert (vendor_call(workload(op, TINY, 160, filled=False), REFERENCE) is None) == (op in WITHOUT)


@pytest.mark.parametrize("op", [op for op in OPS if "attention" in op])
def test_dense_attention_covers_all_tokens(op):
    work = workload(op, TINY, 160, batch=2)
    call = call_of("sdpa", work)
    assert call is not None
    result = call()
    if op.endswith("_grad"):
        assert [tensor.shape[2] for tensor in result] == [160, 160, 160]
    else:
        assert result.shape == (2, 4, 1 if op.endswith("_infer") else 160, 32)


@pytest.mark.parametrize("op", OPS)
def test_the_gate_lets_no_wrong_result_through(op):
    work = workload(op, TINY, 160, batch=2)
    judge, result = gate(work), work.call("reference")
    assert judge.worst(result).ok
    first, *rest = result if isinstance(result, tuple) else (result,)
    for number in range(1 + len(rest)):
        outputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (first, *rest)]
        spoil(outputs[number])
        assert not judge.worst(tuple(outputs) if rest else outputs[0]).ok, f"output {number}"


def spoil(tensor):
    """One element in fifty is off by a tenth, or by a block."""
    flat = tensor.view(-1)
    flat[::50] += 1 if flat.dtype.is_floating_point is False else 0.1 * flat.abs().max()
