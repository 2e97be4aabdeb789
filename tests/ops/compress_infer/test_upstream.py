"""The same kernel under upstream Triton: it compiles for a Hopper GPU, on a machine that need not have one."""

from __future__ import annotations

import inspect

import pytest
import torch

from nsa_triton.ascend.lower import signature_of
from nsa_triton.ascend.toolchain import triton_problem
from nsa_triton.runtime.target import Target

if triton_problem("triton") is not None:
    pytest.skip("upstream Triton is not what owns triton/ here", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nsa_triton.ops.compress_infer import launch

GPU = Target("cuda", "nvidia-h200", 132, 132)
# window, stride, page, head size
SHAPES = [(32, 16, 64, 128), (48, 48, 48, 100), (128, 128, 128, 600), (32, 16, None, 192)]


def source(planned):
    signature, constexprs = signature_of(planned.arguments), dict(planned.constexprs)
    if "constants" in inspect.signature(ASTSource).parameters:  # Triton 3.2
        return ASTSource(planned.kernel, signature=signature, constants=constexprs)
    return ASTSource(planned.kernel, {**signature, **dict.fromkeys(constexprs, "constexpr")}, constexprs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("block", "stride", "page", "size"), SHAPES)
def test_the_kernel_compiles_for_hopper(block, stride, page, size, dtype):
    for planned in launch.compile_plans(GPU, dtype, 4, size, block, stride, page):
        compiled = triton.compile(source(planned), target=GPUTarget("cuda", 90, 32), options=dict(planned.options))
        assert ".target sm_90" in compiled.asm["ptx"]
