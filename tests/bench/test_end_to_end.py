"""The layer benchmark: what it times, writes and refuses."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

from bench import end_to_end
from bench.run import Session
from nsa_triton.cli import main
from nsa_triton.errors import ArgumentValueError
from nsa_triton.workloads import SHAPES, Shape
from tests.implementations import kernel_problem

PROBLEM = kernel_problem("sliding_window_attention")
pytestmark = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)

TINY = Shape("tiny", 4, 1, 16, 16, count=4, local=30)
SESSION = Session(torch.device("cpu"), 0.0)


def test_both_layers_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(SHAPES, "small", replace(TINY, name="small"))
    file = end_to_end.run(torch.device("cpu"), ["tiny", "small"], [70], tmp_path, rounds=3)
    assert file == tmp_path / "cpu" / "end_to_end.csv"
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [(row["shape"], row["what"], row["provider"]) for row in rows] == [
        (shape, what, provider)
        for shape in ("tiny", "small")
        for what in ("training step", "decoding")
        for provider in ("ours", "dense")
    ]
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert (row["tokens"], row["rounds"], row["target"]) == ("70", "3", "cpu")
    assert rows[1]["× dense"] == rows[3]["× dense"] == "1.00"
    assert capsys.readouterr().out.count("× dense") == 8


def test_what_decodes_wrongly_is_not_timed(monkeypatch):
    layers = end_to_end.Layers.of(TINY, SESSION)
    decoding = end_to_end.Decoding(layers, 40, 4)
    decoding.refuse_other_results()
    with torch.no_grad():
        decoding.cache.values.mul_(1.1)
    with pytest.raises(ArgumentValueError, match="ours: expected decoding to differ by"):
        decoding.refuse_other_results()


@pytest.mark.parametrize("given", [["nsa_compress"], ["--quick"], ["--providers", "sdpa"], ["--indices", "local"]])
def test_the_command_takes_no_choice_of_operators(given, capsys):
    assert main(["bench", "--end-to-end", *given]) == 2
    assert "to be left out with --end-to-end" in capsys.readouterr().err
