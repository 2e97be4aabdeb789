"""Rows survive whatever stops a run, and never get lost or mixed up."""

from __future__ import annotations

import errno
import os

import pytest

from bench.results import COLUMNS, ResultFile, Row, read
from nsa_triton.errors import ArgumentValueError


def row(op: str = "nsa_compress", provider: str = "ours", **more: str) -> Row:
    case = {"shape": "paper", "dtype": "bfloat16", "batch": "1", "tokens": "64", "indices": "", "cache": "cold"}
    return Row(provider, "ok", op, **{**case, **more})


def test_rows_are_on_the_disk_at_once_and_a_resumed_run_has_them(tmp_path):
    file = ResultFile(tmp_path, "bench", resume=False)
    file.append([row(p50_us="1.5"), row(provider="sdpa")])
    assert read(file.part) == file.rows
    assert not file.path.exists()
    again = ResultFile(tmp_path, "bench", resume=True)  # the first was killed
    assert again.rows == file.rows
    again.append([row("nsa_compress_grad")])
    again.finish()
    assert [one.op for one in read(again.path)] == ["nsa_compress", "nsa_compress", "nsa_compress_grad"]
    assert not again.part.exists()


def test_a_row_that_was_cut_is_left_out(tmp_path):
    file = ResultFile(tmp_path, "bench", resume=False)
    file.append([row(), row("nsa_compress_grad")])
    os.truncate(file.part, file.part.stat().st_size - 5)
    assert ResultFile(tmp_path, "bench", resume=True).rows == [row()]
    assert read(file.part) == [row()]


def test_a_new_run_does_not_overwrite_an_unfinished_one(tmp_path):
    ResultFile(tmp_path, "bench", resume=False).append([row()])
    with pytest.raises(ArgumentValueError, match=r"--resume.*bench\.csv\.part.*delete"):
        ResultFile(tmp_path, "bench", resume=False)
    assert read(tmp_path / "bench.csv.part") == [row()]


def test_newer_rows_replace_those_of_the_same_case_only(tmp_path):
    for found in (
        [row(p50_us="1"), row(cache="warm", p50_us="2"), row("nsa_compress_grad", p50_us="3")],
        [row(p50_us="4")],
    ):
        file = ResultFile(tmp_path, "bench", resume=False)
        file.append(found)
        file.finish()
    kept = {one.key: one.p50_us for one in read(tmp_path / "bench.csv")}
    assert list(kept.values()) == ["2", "3", "4"]
    assert kept[row().key] == "4"


@pytest.mark.parametrize("place", ["file/below", "/proc/bench"])
def test_a_folder_that_cannot_be_written_is_the_users_to_know(tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ArgumentValueError, match="--output: expected a folder that can be written"):
        ResultFile(tmp_path / place, "bench", resume=False)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    file = ResultFile(tmp_path, "bench", resume=False)
    file.append([row()])
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArgumentValueError, match=r"No space left on device.*--resume"):
        file.append([row("nsa_compress_grad")])
    with pytest.raises(ArgumentValueError, match="No space left on device"):
        file.finish()
    monkeypatch.setattr(os, "fsync", real)
    assert [one.name for one in tmp_path.iterdir()] == ["bench.csv.part"], "and leaves no rubbish"
    assert ResultFile(tmp_path, "bench", resume=True).rows == [row()]


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "bench.csv").write_text("operator,tokens\nnsa_compress,8K\n")
    with pytest.raises(ArgumentValueError, match="operator, tokens"):
        read(tmp_path / "bench.csv")


def test_estimates_have_columns_of_their_own():
    assert {"p50_us", "simulated_us", "bound_us"} <= set(COLUMNS)
    assert row(p50_us="1.0").us == 1.0
    assert row(simulated_us="2.0").us == 2.0
    assert row().us is None
