"""Programs of the compilers are run once; where one was lost, and gave no answer, once more."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest

from nsa_triton.ascend import tools
from nsa_triton.ascend.lower import Specialization, lower
from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.ascend.tools import run_tool
from nsa_triton.errors import CompileError, ToolchainError


class Tool:
    """A shell script; `runs` says how often it was begun."""

    def __init__(self, folder: Path, script: str) -> None:
        self._log = folder / "runs"
        self._log.touch()
        self.path = folder / "some-opt"
        self.path.write_text(
            f"#!/bin/sh\necho . >> {self._log}\nfirst() {{ [ $(wc -l < {self._log}) = 1 ]; }}\n{script}\n"
        )
        self.path.chmod(0o755)

    @property
    def runs(self) -> int:
        return len(self._log.read_text().splitlines())


def test_an_answer_is_taken_as_it_is(tmp_path, caplog):
    tool = Tool(tmp_path, "cat; echo wrong >&2; exit 3")
    done = run_tool([str(tool.path)], input="module")
    assert (done.returncode, done.stdout, done.stderr) == (3, "module", "wrong\n")
    assert tool.runs == 1
    assert not caplog.records


def test_a_program_that_a_signal_ended_runs_once_more(tmp_path, caplog):
    tool = Tool(tmp_path, "first && kill -SEGV $$; cat")
    with caplog.at_level(logging.WARNING, logger="nsa_triton"):
        done = run_tool([str(tool.path)], input="module")
    assert (done.returncode, done.stdout) == (0, "module")
    assert tool.runs == 2
    assert caplog.messages == ["some-opt was ended by signal 11; it runs once more"]


def test_a_program_that_crashes_twice_has_crashed(tmp_path):
    tool = Tool(tmp_path, "echo why >&2; kill -SEGV $$")
    done = run_tool([str(tool.path)])
    assert (done.returncode, done.stderr) == (-11, "why\n")
    assert tool.runs == 2


def test_a_program_that_does_not_start(tmp_path, caplog):
    missing = tmp_path / "some-opt"
    with pytest.raises(ToolchainError, match=r"some-opt does not run: .*No such file"):
        run_tool([str(missing)])
    assert "some-opt did not start: " in caplog.text


def test_a_program_that_starts_the_second_time(tmp_path, monkeypatch):
    tool = Tool(tmp_path, "echo here")
    run, failures = subprocess.run, [OSError(26, "Text file busy")]

    def fails_at_first(*args, **kwargs):
        if failures:
            raise failures.pop()
        return run(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", fails_at_first)
    assert run_tool([str(tool.path)]).stdout == "here\n"


def test_one_that_hangs_is_not_waited_for_twice(tmp_path, monkeypatch):
    tool = Tool(tmp_path, "echo begun >&2; exec sleep 60")
    monkeypatch.setattr(tools, "TIMEOUT", 0.5)
    with pytest.raises(CompileError, match="some-opt did not end within") as error:
        run_tool([str(tool.path)])
    assert error.value.log == "begun\n"
    assert tool.runs == 1


@pytest.mark.parametrize("status", [-11, 1])
@pytest.mark.skipif(bool(front_end_problem()), reason=f"needs triton-ascend: {front_end_problem()}")
def test_lowering_is_asked_again_where_its_program_crashed(status, monkeypatch):
    from triton.backends.ascend import compiler

    from tests.ascend import compile_kernels

    spec = Specialization(compile_kernels.modulo, {"x": "*i32", "y": "*i32", "n": "i32"}, {"BLOCK": 64})
    asked = []
    ttir_to_linalg = compiler.ttir_to_linalg

    def crashes_at_first(*arguments, **options):
        asked.append(arguments)
        if len(asked) == 1:
            raise subprocess.CalledProcessError(status, ["triton-adapter-opt"], stderr=b"")
        return ttir_to_linalg(*arguments, **options)

    monkeypatch.setattr(compiler, "ttir_to_linalg", crashes_at_first)
    if status < 0:
        assert "func.func @modulo" in lower(spec).text
    else:
        with pytest.raises(CompileError, match=r"could not lower .* triton-adapter-opt ended with status 1"):
            lower(spec)
        assert len(asked) == 1
