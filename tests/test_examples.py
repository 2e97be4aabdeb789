"""The examples run as they stand, on this CPU, and print what their readers are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nsa_triton
from tests.implementations import kernel_problem

ROOT = Path(nsa_triton.__file__).parent.parent
FOLDER = ROOT / "examples"
EXAMPLES = sorted(file.stem for file in FOLDER.glob("*.py"))
PROBLEM = kernel_problem("select_attention")
runs_kernels = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)


def run(name, folder, *arguments):
    """What an example prints, in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, output):
    return [float(number) for number in re.findall(pattern, output)]


def test_there_are_five():
    assert EXAMPLES == ["decode", "llama", "one_op", "training", "tune"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_listed(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 80
    assert f"[{name}.py]({name}.py)" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_does(name, tmp_path):
    if name == "llama":
        pytest.importorskip("transformers", reason="pip install 'nsa_triton[hf]'")
    output = run(name, tmp_path, "--help")
    first_line = (FOLDER / f"{name}.py").read_text().splitlines()[0].strip('"')
    assert first_line[:40] in " ".join(output.split())
    assert "--device" in output or name == "tune"


@runs_kernels
def test_one_op(tmp_path):
    output = run("one_op", tmp_path, "--dtype", "float16")
    errors = numbers(r"(?m)^  (?:output|gradient of).* (\S+)$", output)
    assert len(errors) == 3
    assert max(errors) < 1e-3  # one rounding to float16
    assert "[42, 0, 83] windows" in output
    assert "the same bits: True" in output


@runs_kernels
def test_training(tmp_path):
    losses = numbers(r"loss (\S+),", run("training", tmp_path))
    assert len(losses) == 9
    assert losses[-1] < losses[0] / 2


@runs_kernels
def test_decode(tmp_path):
    output = run("decode", tmp_path)
    errors = numbers(r"largest error .*?: (\d\S+e[+-]\d+)", output)
    assert len(errors) == 3
    assert max(errors) < 1e-5
    assert "{0: 700, 1: 35, 2: 700}, 12 of 16 pages free" in output  # the fork took none
    assert "{0: 708, 1: 43, 2: 708}, 11 of 16 pages free" in output  # then a copy of the page that both write to
    assert "{1: 43, 2: 703}, 12 of 16 pages free" in output


@runs_kernels
def test_llama(tmp_path):
    pytest.importorskip("transformers", reason="pip install 'nsa_triton[hf]'")
    output = run("llama", tmp_path)
    losses = numbers(r"loss (\S+)", output)
    assert losses[-1] < losses[0] / 2
    assert output.count(" -> ") == 2
    assert "gives the same: True" in output
    for name in ("gate_proj.weight", "gate_proj.bias", "nsa.key_weight", "nsa.value_weight"):
        assert name in output


@runs_kernels
def test_tune(tmp_path):
    """It writes nothing elsewhere, and tells of all that it wrote."""
    shipped = {file: file.read_bytes() for file in (ROOT / "autotune_configs").rglob("*.json")}
    output = run("tune", tmp_path)
    assert {file: file.read_bytes() for file in (ROOT / "autotune_configs").rglob("*.json")} == shipped
    (folder,) = tmp_path.glob("nsa-triton-tune-*")
    (journal,) = (folder / "cache" / "tuning").glob("*.jsonl")
    verdicts = [json.loads(line) for line in journal.read_text().splitlines()]
    assert any(verdict.get("verdict") == "timed" for verdict in verdicts)
    written = list((folder / "configs").rglob("*.json"))
    assert ("nothing was written" in output) == (not written)
    for file in written:
        assert f"NSA_TRITON_CONFIG_DIR={folder / 'configs'}" in output
        assert all(entry["evidence"]["how"] == "simulated" for entry in json.loads(file.read_text())["entries"])
    assert "default µs" in output


@runs_kernels
def test_tune_writes_where_it_is_told(tmp_path):
    run("tune", tmp_path, "--output", "here", "--seconds", "3")
    assert (tmp_path / "here" / "cache" / "tuning").is_dir()
    assert not list(tmp_path.glob("nsa-triton-tune-*"))
