"""Runs: what is wrong is not timed, providers take turns, estimates stay apart, interrupted runs go on."""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace

import pytest
import torch

from bench import run as bench
from bench.cases import Point
from bench.providers import call_of, has_torch_npu
from bench.results import read
from bench.timing import Clock, cache_bytes, percentile
from nsa_triton.ascend.toolchain import compilers, front_end_problem

needs_toolchain = pytest.mark.skipif(
    front_end_problem() is not None or not compilers(), reason=f"no Ascend toolchain: {front_end_problem()}"
)
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SHAPE = "gqa-d64-g4"


class Silent:
    """Progress that notes what was begun, and may stop the run as Ctrl-C does."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.begun: list[str] = []
        self.stop_at = stop_at

    def next(self, what: str) -> None:
        if len(self.begun) == self.stop_at:
            raise KeyboardInterrupt
        self.begun.append(what)

    def done(self) -> None:
        """Nothing to count."""


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr("bench.timing.MOST_FLUSHED", 1 << 20)
    return bench.Session(CPU, seconds=0.0, fewest_rounds=2)


def point(op="nsa_compress", providers=("ours", "reference"), tokens=96):
    return Point(op, SHAPE, tokens, None, "scores", providers)


def run(points, session, folder, progress=None, resume=False):
    return bench.run(points, session, folder, "bench", resume=resume, progress=progress or Silent())


@needs_toolchain
def test_a_row_says_all_that_is_needed_to_judge_it(session, tmp_path):
    rows, (file,) = run([point("nsa_select_attention", ("ours", "sdpa"))], session, tmp_path)
    assert file == tmp_path / "cpu" / "bench.csv"
    assert read(file) == rows
    assert [(row.provider, row.cache) for row in rows] == [
        (provider, cache) for provider in ("ours", "sdpa") for cache in ("cold", "warm")
    ]
    ours = rows[0]
    assert ours.status == "ok"
    assert 0 < float(ours.p20_us) <= float(ours.p50_us) <= float(ours.p80_us)
    assert 0 < float(ours.rms_error) <= float(ours.rms_limit)
    assert (ours.live_blocks, ours.indices, ours.rounds) == ("1.33", "scores", "2"), "64 tokens see a block, 32 see two"
    assert ours.simulated_us == ours.bound_us == ""
    assert all((ours.target == "cpu", ours.device, ours.torch, ours.triton, ours.nsa_triton, ours.commit, ours.utc))
    assert rows[2].rms_error == "", "dense attention is another result"


def test_what_is_wrong_or_fails_is_not_timed(session, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "host_problem", lambda: None)

    def calls(provider, work):
        def broken():
            raise RuntimeError("out of memory\nmore")

        return {
            "ours": lambda: work.call("reference") * 1.1,
            "torch_npu": lambda: broken(),
            "sdpa": None,
            "reference": call_of("reference", work),
        }[provider]

    monkeypatch.setattr(bench, "call_of", calls)
    monkeypatch.setattr(bench, "has_torch_npu", lambda: True)
    rows, _ = run([point(providers=("ours", "torch_npu", "sdpa", "reference"))], session, tmp_path)
    statuses = {row.provider: row.status for row in rows}
    assert statuses["ours"].startswith("wrong: error 1.0e-01, allowed")
    assert statuses["torch_npu"] == "failed: RuntimeError: out of memory"
    assert statuses["sdpa"].startswith("missing")
    assert {row.provider for row in rows if row.us} == {"reference"}


def test_providers_take_turns_on_inputs_that_take_turns(monkeypatch):
    log = []

    def call(provider, number):
        return lambda: log.append((provider, number))

    monkeypatch.setattr("bench.timing.MOST_FLUSHED", 1 << 20)
    session = bench.Session(CPU, seconds=0.0, fewest_rounds=4)
    times = bench.timed({name: [call(name, i) for i in range(3)] for name in "ab"}, session)
    turns = [key for key, calls in groupby(log)]
    assert turns == [(name, number % 3) for number in range(4) for name in "ab"]
    assert len(log) == 2 * len(turns), "cold, then warm"
    assert {name: len(pairs) for name, pairs in times.items()} == {"a": 4, "b": 4}


def test_an_interrupted_run_goes_on_where_it_was(session, tmp_path):
    points = [point(op, ("reference",)) for op in ("nsa_compress", "nsa_compress_grad", "nsa_compress_infer")]
    with pytest.raises(KeyboardInterrupt):
        run(points, session, tmp_path, Silent(stop_at=2))
    kept = read(tmp_path / "cpu" / "bench.csv.part")
    assert {row.op for row in kept} == {"nsa_compress", "nsa_compress_grad"}
    rows, (file,) = run(points, session, tmp_path, resume=True)
    assert rows[: len(kept)] == kept, "not timed again"
    assert {row.op for row in read(file)} == {one.op for one in points}


@needs_toolchain
def test_estimates_and_their_bounds_stay_apart(session, tmp_path):
    rows, files = run([point("nsa_compress_infer", ("reference", "simulated", "roofline"))], session, tmp_path)
    assert [file.parent.name for file in files] == ["cpu", "simulated-Ascend910B2"]
    measured, estimated = map(read, files)
    assert {row.provider for row in measured} == {"reference"}
    assert all(row.simulated_us == row.bound_us == "" for row in measured)
    simulated, bound = estimated
    assert (simulated.provider, bound.provider) == ("simulated", "roofline")
    assert simulated.p50_us == simulated.cache == ""
    assert simulated.device == "Ascend910B2, simulated"
    assert float(simulated.simulated_us) > float(bound.bound_us) > 0
    assert rows == [*measured, *estimated]


def test_missing_providers_are_named_with_reasons():
    missing = bench.missing_providers([point(providers=("ours", "torch_npu", "roofline"))], "cpu")
    assert set(missing) == {"roofline"} | ({"torch_npu"} if not has_torch_npu() else set())
    assert not bench.missing_providers([point(providers=("roofline", "simulated"))], "cpu")
    assert not bench.missing_providers([point(providers=("roofline",))], "nvidia-h200")


def test_percentiles_are_times_that_were_measured():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, percent) for percent in (20, 50, 80, 100)] == [1.0, 3.0, 4.0, 5.0]
    assert percentile([7.0], 20) == 7.0


def test_the_cpu_has_a_cache():
    assert 1 << 15 <= cache_bytes(CPU) <= 1 << 33


def test_devices_keep_their_own_time(monkeypatch):
    """Events go around each call, and the host waits once, at the end."""
    log: list[object] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append(self)

        def elapsed_time(self, later):
            return 1.5 * (log.index(later) - log.index(self))  # milliseconds

    pretended = SimpleNamespace(Event=Event, synchronize=lambda: log.append("synchronize"))
    monkeypatch.setattr(torch, "pretended", pretended, raising=False)
    monkeypatch.setattr("bench.timing.MOST_FLUSHED", 1 << 10)
    clock = Clock(CPU)
    monkeypatch.setattr(clock, "device", SimpleNamespace(type="pretended"))
    assert clock.cold_and_warm(lambda: log.append("call")) == (3000.0, 3000.0)
    assert [entry if isinstance(entry, str) else "event" for entry in log] == [
        "event", "call", "event", "call", "event", "synchronize",
    ]  # fmt: skip
