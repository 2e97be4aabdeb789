"""The README keeps its word: its example runs, its tables are what the code generates, its names exist."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.cli import COMMANDS
from nsa_triton.settings import VARIABLES
from tests.readme import PAGES, README, regenerated

TEXT = README.read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
PRINTED = (
    "torch.Size([125, 4, 192])",
    "torch.Size([2048, 4, 8]) torch.Size([2048, 16, 192])",
    "torch.Size([2, 1, 16, 128]) torch.Size([2, 1, 16, 128])",
    "torch.Size([300, 256]) torch.Size([32, 1])",
    "torch.Size([13, 4, 192])",
)
# The second example goes on where the first ended.
SNIPPETS[1] = SNIPPETS[0] + SNIPPETS[1]
# An empty module stands in for torch_npu, which needs CANN.
STAND_IN = "import sys, types; sys.modules['torch_npu'] = types.ModuleType('torch_npu')\n"
SNIPPETS = [STAND_IN * ("import torch_npu\n" in snippet) + snippet for snippet in SNIPPETS]

NAMES = ("compression", "training", "decoding", "module", "patching")
EXAMPLES = list(zip(SNIPPETS, PRINTED, strict=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_current(page):
    assert regenerated(page) == page.read_text(), "run: python -m tests.readme"


@pytest.mark.skipif(front_end_problem() is not None, reason=f"no Ascend front end: {front_end_problem()}")
@pytest.mark.parametrize(("snippet", "printed"), EXAMPLES, ids=NAMES)
def test_examples_run_as_printed(snippet, printed, tmp_path):
    run = subprocess.run([sys.executable, "-W", "error", "-c", snippet], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert printed in run.stdout


def test_settings_table_is_that_of_the_code():
    assert dict(re.findall(r"\| `(NSA_TRITON_\w+)` \| (.+?) \|\n", TEXT)) == VARIABLES


def test_commands_exist():
    assert set(re.findall(r"nsa-triton (\w+)", TEXT)) <= set(COMMANDS)


def test_linked_files_exist():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)
