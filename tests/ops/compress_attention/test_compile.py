"""What `nsa-triton compile` compiles of this op compiles for the chips, and nothing speaks against it."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import compilers
from nsa_triton.ops.compress_attention.cases import COMPILES
from tests.compiling import CHIPS, VERSIONS, no_ascend, problems, reports

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.compress_attention import launch

# The largest tiles that the shipped file makes: dtype, heads of one group, head sizes, (window, stride, block), K,
# causal, masked.
BF16, FP32 = torch.bfloat16, torch.float32
FINE, USUAL, ODD, COARSE = (16, 16, 16), (32, 16, 64), (48, 32, 96), (16, 16, 128)
WORST = [
    (BF16, 16, 192, 128, USUAL, 16, True, False),
    (BF16, 16, 256, 256, USUAL, 32, True, False),
    (BF16, 1, 256, 256, FINE, 64, False, True),
    (BF16, 64, 256, 128, COARSE, 16, True, False),
    (BF16, 4, 65, 18, ODD, 5, False, True),
    (FP32, 16, 128, 128, USUAL, 16, True, False),
    (FP32, 1, 256, 256, FINE, 64, False, True),
    (BF16, 16, 512, 512, USUAL, 16, True, False),
    (FP32, 16, 512, 512, USUAL, 16, True, False),
]


def compile_arguments(dtype, heads, key_dim, value_dim, geometry, count, causal, masked):
    return dtype, heads, 1, key_dim, value_dim, *geometry, count, causal, masked


@pytest.mark.parametrize("version", VERSIONS)
def test_every_shipped_config_compiles_without_problems(version):
    assert problems(launch, CHIPS[0], version, [compile_arguments(*shape) for shape in WORST]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chip_name", CHIPS[1:])
def test_every_shipped_config_compiles_for_the_other_chips(chip_name, version):
    assert problems(launch, chip_name, version, [compile_arguments(*shape) for shape in WORST]) == {}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chip_name", CHIPS[1:])
def test_the_shape_of_the_paper_compiles_without_problems(chip_name, version):
    assert problems(launch, chip_name, version, COMPILES[:1]) == {}


def test_matrix_products_use_the_cube_and_the_rest_only_vector_cores():
    """The launcher starts one program per core of the kind that a kernel uses."""
    of_kernels = reports(launch, CHIPS[0], compilers()[0].version, COMPILES[:1])
    found = {report.kernel: report.mix_mode for report in of_kernels}
    products = {"attention_fwd", "attention_dq", "attention_dkv", "compress_attention_scores"}
    assert {kernel for kernel, mode in found.items() if mode == "mix"} == products
    assert {kernel for kernel, mode in found.items() if mode == "aiv"} == set(found) - products


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_all_declared_shapes_compile_without_problems(version):
    assert problems(launch, CHIPS[0], version, COMPILES) == {}
