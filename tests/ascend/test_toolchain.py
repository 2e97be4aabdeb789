"""A missing, clobbered or outdated toolchain is described, with the commands that repair it, and never crashes."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
import sys

import pytest

from nsa_triton.ascend import toolchain
from nsa_triton.errors import ToolchainError


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these distributions are installed, and no others."""

    def pretend(**versions):
        names = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(toolchain, "distribution_version", names.get)

    return pretend


def there(problem: ToolchainError | None) -> ToolchainError:
    assert problem is not None
    return problem


def test_both_tritons_installed_names_them_and_the_repair(installed):
    installed(triton="3.6.0", triton_ascend="3.2.0")
    for wanted, last in (("triton-ascend", "triton-ascend==3.2.0"), ("triton", "'triton>=3.2'")):
        problem = there(toolchain.triton_problem(wanted))
        assert "triton 3.6.0 and triton-ascend 3.2.0 are both installed" in str(problem)
        assert problem.commands[0] == "pip uninstall -y triton triton-ascend"
        assert problem.commands[-1].endswith(last)


def test_the_other_triton_installed(installed):
    installed(triton="3.6.0")
    assert "triton 3.6.0 owns the triton/ folder" in str(toolchain.triton_problem("triton-ascend"))
    assert toolchain.triton_problem("triton") is None


def test_nothing_installed(installed):
    installed()
    assert "pip install 'nsa_triton[cpu]'" in str(toolchain.triton_problem("triton-ascend"))
    assert "pip install 'nsa_triton[cuda]'" in str(toolchain.triton_problem("triton"))


@pytest.mark.parametrize("version", [(3, 8), (3, 12), (3, 14)])
def test_a_python_without_wheels(installed, monkeypatch, version):
    installed()
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    problem = there(toolchain.triton_problem("triton-ascend"))
    assert f"this is Python {version[0]}.{version[1]}" in str(problem)
    assert "python3.11 -m venv" in problem.commands[0]


def test_pythons_with_wheels_are_told_to_install(installed, monkeypatch):
    installed()
    for minor in (9, 10, 11):
        monkeypatch.setattr(sys, "version_info", (3, minor, 0))
        assert str(toolchain.triton_problem("triton-ascend")).startswith("triton-ascend is not installed")


def test_missing_pybind11(installed, monkeypatch):
    installed(triton_ascend="3.2.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert there(toolchain.front_end_problem()).commands == ("pip install pybind11",)


def test_a_triton_folder_without_the_ascend_back_end(installed, monkeypatch, tmp_path):
    installed(triton_ascend="3.2.0")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    assert "no Ascend back end" in str(toolchain.front_end_problem())
    tool = tmp_path / "backends" / "ascend" / "triton-adapter-opt"
    tool.parent.mkdir(parents=True)
    tool.touch()
    assert toolchain.front_end_problem() is None


@pytest.fixture
def compiler_folder(tmp_path, monkeypatch):
    """Make folders that look like installed ascendnpu-ir, found through NSA_TRITON_COMPILERS."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv("NSA_TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def make(version, mode=0o755, place=None):
        folder = place or tmp_path / f"place-{version}"
        (folder / f"ascendnpu_ir-{version}.dist-info").mkdir(parents=True)
        tools = folder / "ascendnpuir" / "bin"
        tools.mkdir(parents=True)
        for name in ("bishengir-compile", "bishengir-opt"):
            (tools / name).write_text("#!/bin/sh\n")
            (tools / name).chmod(mode)
        known = os.environ.get("NSA_TRITON_COMPILERS", "")
        monkeypatch.setenv("NSA_TRITON_COMPILERS", f"{known}{os.pathsep}{folder}")
        return folder

    monkeypatch.setenv("NSA_TRITON_COMPILERS", "")
    return make


def test_compilers_are_found_newest_first(compiler_folder):
    for version in ("1.0.0", "1.10.0", "1.2.0"):
        compiler_folder(version)
    assert [found.version for found in toolchain.compilers()] == ["1.10.0", "1.2.0", "1.0.0"]
    assert toolchain.compiler().version == "1.10.0"
    assert toolchain.compiler("1.0.0").compile.name == "bishengir-compile"


def test_compilers_in_the_cache_folder_are_found(compiler_folder, tmp_path):
    compiler_folder("1.0.0", place=tmp_path / "cache" / "compilers" / "1.0.0")
    toolchain._compilers.cache_clear()
    assert [found.version for found in toolchain.compilers()] == ["1.0.0"]


def test_lost_run_bits_are_restored(compiler_folder):
    folder = compiler_folder("1.0.0", mode=0o644)
    (found,) = toolchain.compilers()
    assert found.bin == folder / "ascendnpuir" / "bin"
    assert found.compile.stat().st_mode & stat.S_IXUSR


def test_an_unknown_version_says_how_to_get_it(compiler_folder):
    compiler_folder("1.2.0")
    with pytest.raises(ToolchainError, match=r"ascendnpu-ir 1\.0\.0 was not found") as error:
        toolchain.compiler("1.0.0")
    assert "pip install --no-deps --target" in error.value.commands[0]
    assert error.value.commands[0].endswith("ascendnpu-ir==1.0.0")


def test_no_compiler_at_all(compiler_folder):
    with pytest.raises(ToolchainError, match="found: none"):
        toolchain.compiler()


def test_the_command_line_reports_a_clobbered_folder_without_a_traceback(tmp_path):
    """Two distributions own triton/: every command that needs kernels says so, with the repair."""
    for name, version in (("triton", "9.9.9"), ("triton_ascend", "3.2.0")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def run(*arguments):
        command = [sys.executable, "-m", "nsa_triton", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    for command in (("check", "--target", "cpu"), ("compile",)):
        done = run(*command)
        assert done.returncode == 2, done.stdout
        assert "overwritten" in done.stderr
        assert "pip uninstall -y triton triton-ascend" in done.stderr
        assert "Traceback" not in done.stderr
    assert "CLOBBERED" in run("env").stdout


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("bishengir-compile 1.2.0 (some/folder 8796a8ac1508 2026-07-29)", "1.2.0"),
        ("bishengir-compile version 0.1.0 (e4e2ba9841d1 2026-01-16)", "1.0.0"),  # what the one of the wheel 1.0.0 says
        ("something else", None),
    ],
)
def test_version_of_the_compiler_on_path(says, version, tmp_path, monkeypatch):
    executable = tmp_path / "bishengir-compile"
    executable.write_text(f"#!/bin/sh\necho '{says}'\n")
    executable.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    toolchain.compiler_on_path.cache_clear()
    assert toolchain.compiler_on_path() == version
    toolchain.compiler_on_path.cache_clear()


@pytest.mark.parametrize("found", toolchain.compilers(), ids=lambda found: found.version)
def test_compilers_say_the_version_of_their_wheel(found, monkeypatch):
    monkeypatch.setenv("PATH", f"{found.bin}{os.pathsep}{os.environ['PATH']}")
    toolchain.compiler_on_path.cache_clear()
    assert toolchain.compiler_on_path() == found.version
    toolchain.compiler_on_path.cache_clear()
