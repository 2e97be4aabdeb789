"""What `nsa-triton compile` compiles of this op compiles for the chips, and nothing speaks against it."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import compilers
from nsa_triton.ops.compress_attention_infer.cases import COMPILES
from tests.compiling import CHIPS, VERSIONS, no_ascend, problems, reports

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.compress_attention_infer import launch

# For every entry of the shipped file, the largest tiles it makes, and one split and many: head sizes, heads of one
# group, batches, query tokens, K, (window, stride, block).
BF16, FP32 = torch.bfloat16, torch.float32
FINE, USUAL, COARSE = (16, 16, 16), (32, 16, 64), (16, 16, 128)
WORST = [
    (BF16, 1, 16, 256, 256, 1, 64, FINE),
    (BF16, 64, 16, 256, 256, 1, 64, USUAL),
    (BF16, 64, 1, 256, 128, 1, 64, COARSE),
    (BF16, 1, 4, 256, 256, 4, 64, FINE),
    (BF16, 1, 8, 256, 128, 4, 64, USUAL),
    (BF16, 64, 32, 256, 128, 1, 64, USUAL),
    (BF16, 1, 32, 256, 256, 1, 512, USUAL),
    (BF16, 1, 16, 512, 256, 4, 64, FINE),
    (FP32, 1, 16, 256, 256, 1, 1024, FINE),
    (FP32, 1, 4, 256, 256, 4, 64, FINE),
    (FP32, 64, 16, 512, 256, 1, 64, FINE),
]
# Entries that say why they take more.
FULL = [
    (BF16, 64, 16, 512, 512, 1, 64, FINE),
    (FP32, 64, 16, 512, 512, 1, 1024, FINE),
    (BF16, 1, 16, 192, 128, 1, 4096, USUAL),
    (FP32, 1, 16, 256, 256, 1, 4096, FINE),
    (BF16, 1, 16, 512, 512, 1, 4096, USUAL),
]


def compile_arguments(dtype, batch, heads, key_dim, value_dim, tokens, count, geometry):
    return dtype, batch, heads, 1, key_dim, value_dim, *geometry, count, 128, tokens, 16384


@pytest.mark.parametrize("version", VERSIONS)
def test_every_shipped_config_compiles_without_problems(version):
    assert problems(launch, CHIPS[0], version, [compile_arguments(*shape) for shape in WORST]) == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_configs_that_fill_the_unified_buffer_compile_without_other_problems(version):
    found = problems(launch, CHIPS[0], version, [compile_arguments(*shape) for shape in FULL])
    assert all(problem.startswith("UB is") for of_kernel in found.values() for problem in of_kernel), found


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chip_name", CHIPS[1:])
def test_every_shipped_config_compiles_for_the_other_chips(chip_name, version):
    assert problems(launch, chip_name, version, [compile_arguments(*shape) for shape in WORST]) == {}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chip_name", CHIPS[1:])
def test_the_shape_of_the_paper_compiles_without_problems(chip_name, version):
    assert problems(launch, chip_name, version, COMPILES[:1]) == {}


def test_attention_uses_the_cube_and_the_choice_only_vector_cores():
    """The launcher starts one program per core of the kind that a kernel uses."""
    shape = (torch.bfloat16, 4, 64, 4, 192, 128, 32, 16, 64, 16, 128, 1, 4096)
    found = reports(launch, "Ascend910B2", compilers()[0].version, [shape])
    modes = {report.kernel: report.mix_mode for report in found}
    assert modes == {"compress_attention_split": "mix", "compress_attention_choose": "aiv"}


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_all_declared_shapes_compile_without_problems(version):
    assert problems(launch, CHIPS[0], version, COMPILES) == {}
