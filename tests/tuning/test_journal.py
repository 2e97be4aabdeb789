"""The journal: every verdict is on disk at once, a killed process loses at most the one it was writing."""

from __future__ import annotations

import json
import logging

import pytest

from nsa_triton.errors import ConfigError
from nsa_triton.tuning.journal import RIGHT, Journal
from nsa_triton.tuning.sweep import Verdict
from tests.tuning.sweeps import candidate, timed

ONE, TWO = candidate(BD=16), candidate({"multibuffer": False}, BD=32)
IDENTITY = {"op": "nsa_op"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tuning" / "sweep.jsonl"


def filled(path):
    with Journal(path, IDENTITY) as journal:
        journal.note(ONE, timed(3.5))
        journal.note(TWO, Verdict("compiler", "UB overflow", ub_percent=91.5, seconds=0.25))
        journal.note_gate(ONE, RIGHT)
        journal.note_gate(TWO, "wrong numbers")


def test_everything_comes_back(path):
    filled(path)
    with Journal(path, IDENTITY) as journal:
        assert journal.verdicts == {
            ONE: timed(3.5),
            TWO: Verdict("compiler", "UB overflow", ub_percent=91.5, seconds=0.25),
        }
        assert journal.gated == {ONE: RIGHT, TWO: "wrong numbers"}
    assert json.loads(path.read_text().splitlines()[0]) == {"sweep": IDENTITY}


def test_each_verdict_is_there_at_once(path):
    with Journal(path, IDENTITY) as journal:
        journal.note(ONE, timed(3.5))
        assert json.loads(path.read_text().splitlines()[-1])["us"] == 3.5


@pytest.mark.parametrize("torn", [b'{"tiles": {"BD"', b'{"tiles": {"BD"\n', b"\n", b"\x00\xff\n"])
def test_a_torn_last_line_is_dropped_with_a_notice(path, caplog, torn):
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with caplog.at_level(logging.WARNING, logger="nsa_triton"), Journal(path, IDENTITY) as journal:
        assert len(journal.verdicts) == 2
        assert path.read_bytes() == whole
        journal.note(ONE, timed(1.0))
    assert "the last line was not finished" in caplog.text
    assert path.read_bytes().startswith(whole)
    with Journal(path, IDENTITY) as journal:
        assert journal.verdicts[ONE] == timed(1.0)


@pytest.mark.parametrize("line", ["{", "[]", '{"tiles": {}}', '{"tiles": {}, "options": {}, "verdict": "good"}'])
def test_a_corrupt_line_in_the_middle_is_an_error_with_its_number(path, line):
    filled(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(ConfigError, match=r"line 3 is not a line of a journal .*--fresh starts over"):
        Journal(path, IDENTITY)


def test_fresh_starts_over(path):
    filled(path)
    with Journal(path, IDENTITY, fresh=True) as journal:
        assert not journal.verdicts
    assert len(path.read_text().splitlines()) == 1


def test_one_process_at_a_time(path):
    with Journal(path, IDENTITY), pytest.raises(ConfigError, match="another process is at work on this very sweep"):
        Journal(path, IDENTITY)
    Journal(path, IDENTITY).__exit__()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"sweep.jsonl: cannot be written: .*NSA_TRITON_CACHE_DIR"):
        Journal(tmp_path / "file" / "sweep.jsonl", IDENTITY)


def test_a_full_disk_is_said(path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with Journal(path, IDENTITY) as journal:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            journal.note(ONE, timed(1.0))
