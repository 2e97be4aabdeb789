"""nsa-triton as a user meets it: in a process of its own, with good and bad arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nsa_triton.ascend.toolchain import compilers, front_end_problem
from nsa_triton.cli import COMMANDS
from nsa_triton.ops.catalog import FAMILIES

needs_toolchain = pytest.mark.skipif(
    front_end_problem() is not None or not compilers(), reason=f"no Ascend toolchain: {front_end_problem()}"
)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "nsa_triton", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"example: nsa-triton {command}" in done.stdout


def test_no_command_and_unknown_command_list_the_valid_ones():
    unknown = run("nothing")
    assert unknown.returncode == run().returncode == 2
    assert all(command in unknown.stderr for command in COMMANDS)


@pytest.mark.parametrize("command", ["check", "compile", "ops"])
def test_unknown_op_lists_the_valid_ones(command):
    done = run(command, "npu_nsa_dream")
    assert done.returncode == 2
    assert "'npu_nsa_dream'" in done.stderr
    assert all(op.name in done.stderr for family in FAMILIES for op in family.ops)
    assert "Traceback" not in done.stderr


def test_ops_lists_every_op_and_prints_json_and_markdown():
    plain, as_json, markdown = run("ops"), run("ops", "--json"), run("ops", "--markdown")
    for family in FAMILIES:
        for op in family.ops:
            assert op.name in plain.stdout
            assert op.vendor in markdown.stdout
    assert [op["name"] for op in json.loads(as_json.stdout)] == [op.name for family in FAMILIES for op in family.ops]


def test_env_reports_versions_and_survives_a_broken_setting():
    assert "torch" in json.loads(run("env", "--json").stdout)
    broken = run("env", NSA_TRITON_LIMITS="maybe", NSA_TRITON_CONFIG_DIR="")
    assert broken.returncode == 0
    assert "expected one of structural, documented, got 'maybe'" in broken.stdout


def test_output_has_no_colours_where_it_is_no_terminal():
    assert "\x1b[" not in run("ops", NO_COLOR="1").stdout + run("ops").stdout


@needs_toolchain
def test_check_passes_and_shows_errors_and_times():
    # One thread: the references work on many small tensors, which a second one only slows down.
    done = run("check", "--target", "cpu", "--json", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["op"] for row in rows} == {op.name for family in FAMILIES for op in family.ops}
    assert all(row["ok"] and 0 <= row["rms_error"] <= row["limit"] for row in rows)
    assert all(row["first_call_s"] > 0 and row["warm_call_s"] > 0 for row in rows)


@needs_toolchain
def test_check_fails_when_a_kernel_is_wrong(tmp_path):
    """A check that cannot fail is worth nothing: spoil the launcher, and `check` must say so."""
    spoil = (
        "import sys, nsa_triton.ops.compress.launch as launch\n"
        "right = launch.forward\n"
        "launch.forward = lambda *a: right(*a) * 1.01\n"
        "from nsa_triton.cli import main\n"
        "sys.exit(main(['check', 'compress', '--target', 'cpu']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", spoil], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("WRONG") == 4  # the forward of each case, and nothing else


@pytest.mark.skipif(front_end_problem() is not None, reason=f"no Ascend front end: {front_end_problem()}")
def test_check_of_an_absent_target_names_the_present_ones():
    done = run("check", "--target", "npu")
    assert done.returncode == 2
    assert "present: " in done.stderr


@needs_toolchain
def test_compile_prints_a_report_and_keeps_the_modules(tmp_path):
    done = run("compile", "compress", "--chip", "Ascend910B2", "--compiler", "1.2.0", "--keep", str(tmp_path), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(done.stdout)
    assert all(report["fits"] and report["chip"] == "Ascend910B2" for report in reports)
    assert list(tmp_path.rglob("*.mlir"))


@needs_toolchain
def test_compile_refuses_unknown_chips_and_compilers():
    assert "Ascend910B2" in run("compile", "--chip", "Ascend1").stderr
    missing = run("compile", "--compiler", "9.9.9")
    assert missing.returncode == 2
    assert "pip install --no-deps --target" in missing.stderr
