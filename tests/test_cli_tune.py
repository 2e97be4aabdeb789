"""nsa-triton tune: what it prints, and that mistakes are said before any work."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nsa_triton.ascend.chips import CHIPS
from nsa_triton.cli import main
from nsa_triton.ops.catalog import FAMILIES
from nsa_triton.tuning import merge, planning, plans
from nsa_triton.tuning.space import SPACES
from nsa_triton.tuning.sweep import Verdict
from nsa_triton.workloads import SHAPES
from tests.tuning.sweeps import CHIP, needs_toolchain

COMMAND = ["tune", "compress_infer", "--tokens", "64", "--workers", "1"]


@pytest.fixture(autouse=True)
def own_journals(tmp_path, monkeypatch):
    from nsa_triton.tuning import journal

    monkeypatch.setattr(journal, "journal_folder", lambda: tmp_path / "journals")
    yield
    merge.forget_configs()


@pytest.fixture
def never(monkeypatch):
    """Nothing may be evaluated."""

    def evaluated(sweep, candidate):
        raise RuntimeError("work began")

    for module in ("workers", "plans", "tune"):
        monkeypatch.setattr(f"nsa_triton.tuning.{module}.evaluate", evaluated)


@pytest.fixture
def given(monkeypatch):
    """Narrower is better; the gate lets all pass but what `wrong` says."""
    wrong: dict[str, str] = {}

    def evaluated(sweep, candidate):
        return Verdict("timed", us=float(dict(candidate.tiles)["BD"]), seconds=0.5)

    for module in ("workers", "plans"):
        monkeypatch.setattr(f"nsa_triton.tuning.{module}.evaluate", evaluated)
    monkeypatch.setattr(plans, "winners", lambda *_: [])  # what ships must not matter here
    monkeypatch.setattr("nsa_triton.tuning.tune.what_is_wrong", lambda sweep, one: wrong.get(str(one), ""))
    monkeypatch.setattr("nsa_triton.tuning.tune.slower_when_longer", lambda sweep, one: "")
    return wrong


def said(capsys, *command):
    assert main(list(command)) == 2
    return capsys.readouterr().err


def test_an_unknown_op_lists_the_valid_ones(capsys, never):
    found = said(capsys, "tune", "npu_nsa_dream")
    assert all(op.name in found for family in FAMILIES for op in family.ops)


def test_an_unknown_chip_lists_the_valid_ones(capsys, never):
    found = said(capsys, *COMMAND, "--chip", "Ascend1")
    assert "cpu" in found
    assert all(chip in found for chip in CHIPS)


def test_an_unknown_shape_lists_the_valid_ones(capsys, never):
    found = said(capsys, *COMMAND, "--shape", "huge")
    assert all(shape in found for shape in SHAPES)


def test_an_unknown_kernel_lists_those_of_the_ops(capsys, never):
    found = said(capsys, "tune", "select_attention", "compress", "--kernel", "compress_infer")
    assert all(space.kernel in found for family in ("select_attention", "compress") for space in SPACES[family])
    assert "compress_attention_scores" not in found


@needs_toolchain
def test_an_unknown_compiler_says_how_to_get_it(capsys, never):
    assert "ascendnpu-ir 9.9.9 was not found" in said(capsys, *COMMAND, "--compiler", "9.9.9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers: expected an integer, at least 1, or ray, got '0'"),
        (["--workers", "many"], "'many'"),
        (["--budget", "0"], "--budget: expected more than 0"),
        (["--tokens", "-1"], "--tokens: expected more than 0"),
        (["--tokens", "16"], "tokens: expected at least 32"),
        (["--ub-limit", "70"], "--ub-limit: expected an integer from 80 to 100"),
    ],
)
@needs_toolchain
def test_bad_numbers_are_refused(capsys, never, arguments, message):
    command = [word for word in COMMAND if "--tokens" not in arguments or word not in ("--tokens", "64")]
    assert message in said(capsys, *command, *arguments)


@needs_toolchain
def test_what_is_measured_is_measured_alone(capsys, never, tmp_path):
    command = [*COMMAND[:-1], "2", "--chip", "cpu", "--output", str(tmp_path)]
    assert "1 on a chip that is measured" in said(capsys, *command)


@needs_toolchain
def test_a_folder_that_cannot_be_written_or_a_corrupt_file_is_known_before_any_work(capsys, never, tmp_path):
    assert "cannot be written" in said(capsys, *COMMAND, "--output", "/proc")
    file = tmp_path / CHIP / "compress_infer.json"
    file.parent.mkdir()
    file.write_text("{")
    assert f"{file}: not valid JSON" in said(capsys, *COMMAND, "--output", str(tmp_path))
    assert file.read_text() == "{"


@needs_toolchain
def test_the_table_the_progress_and_the_file(capsys, given, tmp_path):
    given["BD=16"] = "cache is off"
    assert main([*COMMAND, "--output", str(tmp_path)]) == 0
    found = capsys.readouterr()
    row = next(line for line in found.out.splitlines() if CHIP in line)
    assert "512.0    32.0 16.00 BD=32" in row  # with other options BD=16 is the same program, and so as wrong
    assert "is not kept: cache is off" in found.out
    file = tmp_path / CHIP / "compress_infer.json"
    assert f"written: {file}" in found.out
    assert json.loads(file.read_text())["entries"][0]["tiles"] == {"BD": 32}
    progress = found.err.splitlines()
    assert progress[0].startswith("compress_infer of nsa_compress_infer, paper T=64 on Ascend910B2, ascendnpu-ir ")
    assert progress[1].startswith("[1/10] BD=512: 512.0 µs; best 512.0 µs, default 512.0; ")
    assert progress[-1].startswith("[10/10] ")
    assert "best 16.0 µs, default 512.0" in progress[-1]


@needs_toolchain
def test_it_may_stop_once_all_around_the_best_is_known(capsys, given, tmp_path):
    assert main([*COMMAND, "--until-settled", "--json", "--output", str(tmp_path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["settled"]
    assert found["left"] > 0
    assert found["best"]["tiles"] == {"BD": 16}


@needs_toolchain
def test_json(capsys, given, tmp_path):
    assert main([*COMMAND, "--output", str(tmp_path), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["kernel"], result["us"], result["default_us"]) == ("compress_infer", 16.0, 512.0)
    assert result["best"]["tiles"] == {"BD": 16}
    assert (result["tried"], result["left"], result["problem"]) == (10, 0, "")


@needs_toolchain
def test_an_entry_that_cannot_be_kept_fails_and_says_why(capsys, given, tmp_path):
    assert main([*COMMAND, "--output", str(tmp_path)]) == 0
    file = tmp_path / CHIP / "compress_infer.json"
    file.write_text(file.read_text().replace("simulated", "measured"))
    assert main([*COMMAND, "--output", str(tmp_path)]) == 1
    assert "is measured, the new one is simulated" in capsys.readouterr().out
    assert main([*COMMAND, "--output", str(tmp_path), "--force"]) == 0


@needs_toolchain
def test_a_dry_run_counts_and_writes_no_config(capsys, given, tmp_path):
    assert main([*COMMAND, "--output", str(tmp_path), "--dry-run"]) == 0
    found = capsys.readouterr().out
    # 8 sizes, of which 192 and above launch the same as the default; the default, which was tried, is one more.
    assert "8    7            3     1  0 s" in found
    assert "at most 4 s with one worker" in found
    assert not (tmp_path / CHIP).exists()


@needs_toolchain
def test_ctrl_c_keeps_what_was_found(capsys, given, tmp_path, monkeypatch):
    seen = []

    def interrupted(sweep, candidate):
        seen.append(candidate)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return Verdict("timed", us=float(dict(candidate.tiles)["BD"]))

    monkeypatch.setattr("nsa_triton.tuning.workers.evaluate", interrupted)
    assert main([*COMMAND, "--output", str(tmp_path)]) == 130
    found = capsys.readouterr()
    assert "(8 not tried)" in found.out
    assert "stopped; the same command goes on" in found.err
    assert (tmp_path / CHIP / "compress_infer.json").exists()


@needs_toolchain
def test_on_a_chip_of_this_machine_times_are_measured(capsys, tmp_path, monkeypatch):
    """The kernels run on this CPU, with real data; the default is made slow, so that something better is found."""
    slow, real = {"BD": 16}, planning.default_config
    monkeypatch.setattr(
        plans, "default_config", lambda *asked: dataclasses.replace(real(*asked), tiles=slow, options={})
    )
    command = ["tune", "compress_infer", "--tokens", "8192", "--chip", "cpu", "--output", str(tmp_path), "--json"]
    assert main(command) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["default"]["tiles"] == slow
    assert result["us"] < result["default_us"]
    (entry,) = json.loads((tmp_path / "cpu" / "compress_infer.json").read_text())["entries"]
    evidence = entry["evidence"]
    assert entry["key"] == {"itemsize": 2, "head_dim": 192, "piece": 16}
    assert entry["options"] == {}
    assert evidence["how"] == "measured"
    assert evidence["p20_us"] <= evidence["p50_us"] <= evidence["p80_us"]
    assert evidence["threads"] >= 1
