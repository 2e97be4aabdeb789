"""The rules of the house that CONTRIBUTING.md states, kept by reading every import of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nsa_triton
from nsa_triton.settings import VARIABLES

PACKAGE = Path(nsa_triton.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
OPS = sorted(path.name for path in (PACKAGE / "ops").iterdir() if path.is_dir() and not path.name.startswith("_"))


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports, wherever in it; those for type checkers only do not count."""
    tree = ast.parse(file.read_text())
    found: set[str] = set()
    nodes = list(tree.body) if top_level_only else list(ast.walk(tree))
    typing_only = {
        inner for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }  # fmt: skip
    for node in nodes:
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def any_under(modules: set[str], prefix: str) -> set[str]:
    return {module for module in modules if module == prefix or module.startswith(f"{prefix}.")}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0]


def name(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.relative_to(PACKAGE).parts[0] in ("runtime", "ascend")], ids=name
)
def test_runtime_and_ascend_never_import_ops(file):
    assert not any_under(imports(file), "nsa_triton.ops")


@pytest.mark.parametrize("file", [f for f in FILES if room(f) == "ops"], ids=name)
def test_op_folders_never_import_one_another(file):
    own = file.relative_to(PACKAGE).parts[1]
    if own in OPS:
        others = {op for op in OPS if op != own and any_under(imports(file), f"nsa_triton.ops.{op}")}
        assert not others


TUNING_MAY_IMPORT = (
    "ascend", "runtime", "tuning", "workloads", "errors", "settings", "ops.catalog", "ops._common.accuracy",
    "ops._common.cases", "__version__",
)  # fmt: skip


@pytest.mark.parametrize("file", [f for f in FILES if room(f) == "tuning"], ids=name)
def test_tuning_imports_what_it_may(file):
    allowed = set().union(*(any_under(imports(file), f"nsa_triton.{module}") for module in TUNING_MAY_IMPORT))
    ours = any_under(imports(file), "nsa_triton") - {"nsa_triton"}
    assert ours == allowed


@pytest.mark.parametrize("file", [f for f in FILES if room(f) not in ("cli", "tuning")], ids=name)
def test_only_the_command_line_imports_tuning(file):
    assert not any_under(imports(file), "nsa_triton.tuning")


MODULES_MAY_IMPORT = ("modules", "errors", "ops._common.arguments", "ops._common.lengths")


@pytest.mark.parametrize("file", [f for f in FILES if room(f) == "modules"], ids=name)
def test_modules_compose_public_functions(file):
    """Of an op they import the function of its name and nothing within."""
    found = any_under(imports(file), "nsa_triton")
    allowed = set().union(*(any_under(found, f"nsa_triton.{module}") for module in MODULES_MAY_IMPORT))
    public = {f"nsa_triton.ops.{op}.nsa_{op}" for op in OPS}
    assert found - allowed <= public


@pytest.mark.parametrize(
    "file", [f for f in FILES if room(f) not in ("modules", "integrations", "__init__.py")], ids=name
)
def test_nothing_below_imports_modules(file):
    assert not any_under(imports(file), "nsa_triton.modules")
    assert not any_under(imports(file), "nsa_triton.integrations")


SHARED_SPECIFICATION = ("block_scores", "paged_tokens", "statistics")  # files of _common that references may import


@pytest.mark.parametrize(
    "file",
    [
        *(PACKAGE / "ops" / "_common" / f"{module}.py" for module in SHARED_SPECIFICATION),
        *(PACKAGE / "ops" / op / "reference.py" for op in OPS),
    ],
    ids=name,
)
def test_reference_imports_torch_only(file):
    """And the parts of the specification that several ops share, which import torch only too."""
    found = imports(file)
    for module in SHARED_SPECIFICATION:
        found -= any_under(found, f"nsa_triton.ops._common.{module}")
    outside = {module.split(".")[0] for module in found}
    assert outside <= {"torch", "math", "__future__"}


KERNELS = [file for file in FILES if room(file) == "ops" and file.name.endswith("kernels.py")]
SHARED_KERNELS = ["primitives", *(file.stem for file in KERNELS if file.parent.name == "_common")]


@pytest.mark.parametrize("file", KERNELS, ids=name)
def test_kernels_import_triton_and_what_kernels_share_only(file):
    found = imports(file)
    for module in SHARED_KERNELS:
        found -= any_under(found, f"nsa_triton.ops._common.{module}")
    assert {module.split(".")[0] for module in found} == {"triton"}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_triton_is_imported_by_kernels_and_inside_functions_only(file):
    """`import nsa_triton` must work with torch alone."""
    if not file.name.endswith(("kernels.py", "primitives.py")):
        eager = imports(file, top_level_only=True)
        assert not any_under(eager, "triton")
        assert not any_under(eager, "torch_npu")
        assert not any_under(eager, "llvmlite")


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_assert_and_no_bare_except_for_users(file):
    for node in ast.walk(ast.parse(file.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"line {node.lineno}"


def test_at_most_five_environment_variables_read_in_one_place():
    assert len(VARIABLES) <= 5
    for file in FILES:
        if name(file) not in ("settings.py", "cli/env.py"):
            assert '"NSA_TRITON_' not in file.read_text(), name(file)
