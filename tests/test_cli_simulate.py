"""nsa-triton simulate: right numbers and faults, times, files; on one small case."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.simulator.faults import Fault, SimulationError
from nsa_triton.cli import main, simulate
from nsa_triton.ops.compress_infer import cases
from tests.compiling import no_ascend

needs_toolchain = pytest.mark.skipif(bool(no_ascend()), reason=no_ascend())
CASE = "B=3 N=3"  # the smallest: a few blocks
COMMAND = ["simulate", "compress_infer", "--case", CASE]
RACE = Fault("race", "this reads what that writes", "compress_infer/kernels.py:1")


@pytest.fixture
def spoil(monkeypatch):
    """Replace what the cases of the op run."""
    real = cases.check_cases

    def spoiled(make_run):
        monkeypatch.setattr(
            cases,
            "check_cases",
            lambda device: (dataclasses.replace(case, run=make_run(case)) for case in real(device)),
        )

    return spoiled


@pytest.fixture
def one_race(monkeypatch):
    """Every checker finds the same fault twice."""

    class Finds(Checker):
        def __init__(self) -> None:
            super().__init__()
            self.faults[RACE] = 2

    monkeypatch.setattr(simulate, "Checker", Finds)


@needs_toolchain
def test_the_table_has_numbers_times_and_where_they_come_from(capsys):
    assert main(COMMAND) == 0
    said = capsys.readouterr()
    title = said.out.splitlines()[0]
    assert title.startswith("simulated, model version ")
    assert title.endswith("Ascend910B2: no NPU was involved")
    assert f"nsa_compress_infer fp32 {CASE}" in said.out
    assert "compress_infer/kernels.py:" in said.out
    assert "all numbers are right" in said.out
    assert "faults" not in said.out
    assert said.err.startswith(f"[1/1] nsa_compress_infer float32 {CASE}")


@needs_toolchain
def test_json_has_everything(capsys):
    assert main([*COMMAND, "--check-races", "--full", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["simulated"] is True
    assert content["chip"] == "Ascend910B2"
    (case,) = content["cases"]
    (launch,) = case["launches"]
    assert case["verdict"] == "ok"
    assert [output["output"] for output in case["outputs"]] == ["cache"]
    assert all(output["ok"] and output["rms_error"] <= output["limit"] for output in case["outputs"])
    assert case["us"] == launch["us"] > 0
    assert launch["kernel"] == "compress_infer"
    assert launch["simulated"] is True
    assert launch["faults"] == []


@needs_toolchain
def test_trace_and_plot_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    trace, plot = tmp_path / "trace.json", tmp_path / "plot.png"
    assert main([*COMMAND, "--trace", str(trace), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    for tid in {event["tid"] for event in events}:
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["tid"] == tid)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(spans))


@needs_toolchain
def test_a_wrong_number_fails(capsys, spoil):
    spoil(lambda case: lambda: tuple(1.01 * output for output in case.run()))
    assert main(COMMAND) == 1
    said = capsys.readouterr().out
    assert said.count("WRONG") == 1
    assert "1 of 1 runs are wrong or stopped; 0 different faults" in said


@needs_toolchain
def test_a_fault_fails_and_is_one_line(capsys, one_race):
    assert main([*COMMAND, "--check-races"]) == 1
    said = capsys.readouterr().out
    assert f"{RACE}: 2 in compress_infer by " in said
    assert "1 different faults" in said


@needs_toolchain
def test_a_fault_is_in_the_json_with_its_count(capsys, one_race):
    assert main([*COMMAND, "--check-races", "--json"]) == 1
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["launches"][0]["faults"] == [{**dataclasses.asdict(RACE), "count": 2}]


@needs_toolchain
def test_a_program_that_stops_fails_and_says_why(capsys, spoil):
    def stops():
        raise SimulationError("deadlock: everyone waits")

    spoil(lambda case: stops)
    assert main(COMMAND) == 1
    said = capsys.readouterr().out
    assert "STOPPED" in said
    assert "stopped: deadlock: everyone waits" in said


@needs_toolchain
def test_an_interrupt_keeps_what_was_found(capsys, spoil):
    def interrupted():
        raise KeyboardInterrupt

    spoil(lambda case: case.run if CASE in case.shape else interrupted)
    assert main(["simulate", "compress_infer", "--case", "B=3 N="]) == 130
    assert not capsys.readouterr().out  # the first case was interrupted
    spoil(lambda case: interrupted if "N=8" in case.shape else case.run)
    assert main(["simulate", "compress_infer", "--case", "B=3 N="]) == 130
    said = capsys.readouterr()
    assert CASE in said.out
    assert "stopped" in said.err


@pytest.fixture
def never(spoil):
    def run():
        raise RuntimeError("the simulation began")

    spoil(lambda case: run)


@needs_toolchain
@pytest.mark.parametrize("option", ["--trace", "--plot"])
@pytest.mark.parametrize(("name", "problem"), [("none/x.png", "mkdir -p"), (".png", "Is a directory")])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, never, option, name, problem):
    if option == "--plot":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / ".png").mkdir()
    assert main([*COMMAND, option, str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert f"{option}: expected a file that" in said
    assert option == "--plot" or problem in said


@needs_toolchain
def test_a_picture_must_be_a_png(tmp_path, capsys, never):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main([*COMMAND, "--plot", str(tmp_path / "x.pdf")]) == 2
    assert "--plot: expected a file that ends in .png" in capsys.readouterr().err


def test_an_unknown_case_lists_the_shapes(capsys, never):
    assert main(["simulate", "compress_infer", "--case", "B=77"]) == 2
    said = capsys.readouterr().err
    assert "'B=77'" in said
    assert all(case.shape in said for case in cases.check_cases(torch.device("cpu")))


def test_an_unknown_chip_lists_the_chips(capsys, never):
    assert main(["simulate", "--chip", "Ascend1"]) == 2
    assert "Ascend910B2" in capsys.readouterr().err
