"""What `import nsa_triton` may and may not do, each in a fresh interpreter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nsa_triton

ROOT = Path(nsa_triton.__file__).parent.parent

BLOCK_TRITON = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "torch_npu"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def fresh(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_import_loads_no_triton_and_no_optional_package():
    program = "import sys, nsa_triton; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(re.findall(r"'(\w+)'", fresh(program)))
    assert "torch" in loaded
    assert not loaded & {"triton", "torch_npu", "mindspore", "xdsl", "llvmlite", "rich", "matplotlib"}


def test_import_touches_no_device():
    fresh(
        """
import torch

def touched(*args, **kwargs):
    raise SystemExit("a device was touched")

for name in ("_lazy_init", "current_device", "device_count", "is_available"):
    setattr(torch.cuda, name, touched)
import nsa_triton
assert not torch.cuda.is_initialized()
"""
    )


def test_import_reads_no_setting():
    program = "import os; os.environ['NSA_TRITON_LIMITS'] = 'nonsense'; import nsa_triton"
    fresh(program)


def test_without_triton_everything_but_the_kernels_works():
    output = fresh(
        BLOCK_TRITON
        + """
import torch, nsa_triton
keys, weight = torch.randn(64, 2, 16).half(), torch.randn(32, 2).half()
for _ in range(2):
    assert nsa_triton.nsa_compress(keys, weight, 32, 16, actual_seq_len=[64]).shape == (3, 2, 16)
nsa_triton.nsa_compress(keys, weight, 32, 16, actual_seq_len=[64], impl="reference")
try:
    nsa_triton.nsa_compress(keys, weight, 32, 16, actual_seq_len=[64], impl="triton")
except nsa_triton.ToolchainError as error:
    assert "triton" in str(error).lower()
    assert error.commands
else:
    raise SystemExit("impl='triton' ran without triton")
"""
    )
    assert output.count("impl='auto' runs the slow reference implementation") == 1


def test_public_names():
    for name in nsa_triton.__all__:
        assert getattr(nsa_triton, name) is not None
    assert {"nsa_compress", "nsa_compress_grad", "npu_nsa_compress", "npu_nsa_compress_grad", "limits"} <= set(
        nsa_triton.__all__
    )


def test_the_version_is_that_of_the_project():
    project = ROOT / "pyproject.toml"
    if project.is_file():  # not beside an installed wheel
        assert f'version = "{nsa_triton.__version__}"' in project.read_text()
