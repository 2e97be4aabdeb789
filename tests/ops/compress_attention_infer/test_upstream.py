"""The same kernels under upstream Triton: they compile for a Hopper GPU, on a machine that need not have one."""

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

from nsa_triton.ops.compress_attention_infer import launch

GPU = Target("cuda", "nvidia-h200", 132, 132)
# batches, heads, kv heads, head sizes, window, stride, block, K, page, query tokens, longest
SHAPES = [
    (4, 64, 4, 192, 128, 32, 16, 64, 16, 128, 1, 4096),
    (2, 8, 2, 80, 48, 48, 16, 80, 4, 48, 2, 1024),
    (1, 14, 1, 65, 18, 16, 16, 16, 9, 16, 1, 300),
]


def source(planned):
    signature, constexprs = signature_of(planned.arguments), dict(planned.constexprs)
    if "constants" in inspect.signature(ASTSource).parameters:  # Triton 3.2
        return ASTSource(planned.kernel, signature=signature, constants=constexprs)
    return ASTSource(planned.kernel, {**signature, **dict.fromkeys(constexprs, "constexpr")}, constexprs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_compiles_for_hopper(shape, dtype):
    for planned in launch.compile_plans(GPU, dtype, *shape):
        compiled = triton.compile(source(planned), target=GPUTarget("cuda", 90, 32), options=dict(planned.options))
        assert ".target sm_90" in compiled.asm["ptx"], planned.kernel.__name__
