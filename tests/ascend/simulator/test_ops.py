"""Every op in the simulator, by every compiler: right numbers, no races, nothing undefined, nothing out of bounds."""

from __future__ import annotations

import pytest
import torch

import nsa_triton
from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.toolchain import compilers
from nsa_triton.ops._common.accuracy import judge
from nsa_triton.ops._common.cases import CheckCase
from nsa_triton.ops.catalog import FAMILIES
from nsa_triton.ops.compress import reference
from nsa_triton.runtime.simulation import simulating
from tests.compiling import no_ascend

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.runtime.executors.simulator import SimulatorExecutor

CPU = torch.device("cpu")
# The cases of each op that are run by default; `-m slow` runs all of them.
USUAL = {
    "gated_combine": (4, 5),
    "compress": (6,),
    "compress_infer": (2,),
    "compress_attention": (6, 7),
    "compress_attention_infer": (2,),
    "select_attention": (3, 6, 7),
    "select_attention_infer": (2,),
    "sliding_window_attention": (6, 7),
    "sliding_window_attention_infer": (2,),
}
versions = pytest.mark.parametrize("compiler", compilers(), ids=lambda compiler: compiler.version)


def cases(usual: bool) -> list[CheckCase]:
    found = []
    for family in FAMILIES:
        of_family = list(family.check_cases(CPU))
        found += [case for at, case in enumerate(of_family) if (at in USUAL[family.name]) == usual]
    return found


def assert_right(case: CheckCase, compiler) -> None:
    checker = Checker()
    with simulating(SimulatorExecutor("Ascend910B2", compiler, checker=checker)):
        outputs = case.run()
    assert not checker.faults, "\n".join(map(str, checker.faults))
    expected, eager = case.reference(lambda tensor: tensor.double()), case.reference(lambda tensor: tensor)
    for ours, theirs, truth, terms in zip(outputs, eager, expected, case.terms, strict=True):
        accuracy = judge(ours, theirs, truth, terms=terms)
        assert accuracy.ok, accuracy


@versions
@pytest.mark.parametrize("case", cases(usual=True), ids=lambda case: f"{case.op} {case.shape}")
def test_one_case_of_every_op(case, compiler):
    assert_right(case, compiler)


@pytest.mark.slow
@versions
@pytest.mark.parametrize("case", cases(usual=False), ids=lambda case: f"{case.op} {case.shape}")
def test_all_cases(case, compiler):
    assert_right(case, compiler)


@pytest.mark.slow
@versions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [(16, 16), (32, 16), (48, 32), (64, 16), (96, 64), (128, 128), (128, 48)], ids=str)
def test_every_default_config_of_compression(window, dtype, compiler):
    block, stride = window
    lengths = [3 * block + 5, block - 1, block]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), 3, 144, generator=generator).to(dtype)
    w = torch.randn(block, 3, generator=generator).to(dtype)
    ends = torch.tensor(lengths).cumsum(0)
    checker = Checker()
    with simulating(SimulatorExecutor("Ascend910B2", compiler, checker=checker)):
        y = nsa_triton.nsa_compress(x, w, block, stride, actual_seq_len=ends, impl="triton")
        g = torch.ones_like(y)
        grads = nsa_triton.nsa_compress_grad(g, x, w, block, stride, actual_seq_len=ends, impl="triton")
    assert not checker.faults, "\n".join(map(str, checker.faults))

    def expected(convert):
        sizes = (block, stride, tuple(ends.tolist()))
        return reference.forward(convert(x), convert(w), *sizes), *reference.backward(
            convert(g), convert(x), convert(w), *sizes
        )

    truth, eager = expected(lambda tensor: tensor.double()), expected(lambda tensor: tensor)
    for ours, theirs, exact in zip((y, *grads), eager, truth, strict=True):
        assert judge(ours, theirs, exact, terms=block * 144).ok
