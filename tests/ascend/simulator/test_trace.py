"""Traces and pictures of simulated launches, from events made by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nsa_triton.ascend.simulator import trace
from nsa_triton.ascend.simulator.clock import Event
from nsa_triton.ascend.simulator.instruction import PIPES
from nsa_triton.ascend.simulator.report import LaunchReport
from nsa_triton.ascend.simulator.trace import plot_timeline, write_trace
from nsa_triton.errors import ToolchainError

EVENTS = (
    Event("block 10 AIV0", "V", "vadd", "k.py:3", 3600.0, 3603.0),
    Event("block 2 AIV1", "MTE3", "store", "k.py:4", 5400.0, 7200.0),
    Event("block 2 AIV0", "MTE2", "load", "k.py:2", 1800.0, 3600.0),
    Event("block 2 AIV0", "S", "load", "k.py:1", 1700.0, 1800.0),
    Event("block 2 AIC", "M", "mmadL1", "k.py:5", 2000.0, 2000.5),
)


def report(*, us: float = 5.0, events: tuple[Event, ...] = EVENTS) -> LaunchReport:
    return LaunchReport(
        kernel="some_kernel",
        chip="Ascend910B2",
        compiler="1.2.0",
        model="7",
        blocks=11,
        us=us,
        busy={"AIV MTE2": 0.2},
        shared={"HBM": 0.1},
        critical="AIV MTE2",
        roofline=0.1,
        bytes={"HBM read": 64},
        flops=0,
        lines={"k.py:2": 1.0},
        events=events,
        cycles_per_us=1800.0,
    )


def written(tmp_path: Path, *reports: LaunchReport):
    path = tmp_path / "trace.json"
    write_trace(reports, path)
    return json.loads(path.read_text())


def names(content, what: str):
    events = (event for event in content["traceEvents"] if event["ph"] == "M" and event["name"] == what)
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in events}


def test_a_trace_says_where_it_comes_from(tmp_path):
    other = written(tmp_path, report(), report())["otherData"]
    assert other == {
        "simulated": True, "model version": "7", "chip": "Ascend910B2", "compiler": "ascendnpu-ir 1.2.0"
    }  # fmt: skip


def test_a_trace_has_every_event_in_microseconds_on_the_thread_of_its_pipe(tmp_path):
    content = written(tmp_path, report())
    threads = names(content, "thread_name")
    found = {
        (threads[event["pid"], event["tid"]], event["name"], event["ts"], event["dur"], event["args"]["source"])
        for event in content["traceEvents"]
        if event["ph"] == "X"
    }
    assert found == {
        ("block 2 AIC M", "mmadL1", 1.111, 0.0, "k.py:5"),
        ("block 2 AIV0 S", "load", 0.944, 0.056, "k.py:1"),
        ("block 2 AIV0 MTE2", "load", 1.0, 1.0, "k.py:2"),
        ("block 2 AIV1 MTE3", "store", 3.0, 1.0, "k.py:4"),
        ("block 10 AIV0 V", "vadd", 2.0, 0.002, "k.py:3"),
    }


def test_threads_are_in_the_order_of_blocks_cores_and_the_way_of_the_data(tmp_path):
    content = written(tmp_path, report())
    threads = names(content, "thread_name")
    order = {event["tid"]: event["args"]["sort_index"] for event in content["traceEvents"]
             if event["name"] == "thread_sort_index"}  # fmt: skip
    assert [threads[1, tid] for tid in sorted(order, key=order.__getitem__)] == [
        "block 2 AIC M", "block 2 AIV0 S", "block 2 AIV0 MTE2", "block 2 AIV1 MTE3", "block 10 AIV0 V"
    ]  # fmt: skip
    assert set(trace.PIPES) == set(PIPES)


def test_launches_are_processes_that_share_no_thread(tmp_path):
    content = written(tmp_path, report(), report())
    assert [name.split(",")[0] for name in names(content, "process_name").values()] == ["some_kernel"] * 2
    threads = names(content, "thread_name")
    assert {pid for pid, _ in threads} == {1, 2}
    assert len({tid for _, tid in threads}) == 2 * len(EVENTS)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    kept, real = [], trace.matplotlib_figure()

    def keep(**options):
        kept.append(real(**options))
        return kept[-1]

    monkeypatch.setattr(trace, "matplotlib_figure", lambda: keep)
    return kept


def test_a_picture_shows_the_block_with_the_most_to_do(tmp_path, drawn):
    plot_timeline([report()], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["AIC M", "AIV0 S", "AIV0 MTE2", "AIV1 MTE3"]
    assert axes.get_title(loc="left") == "some_kernel, ascendnpu-ir 1.2.0: 5.0 µs; block 2 of 11"
    assert axes.get_xlim() == (0.0, 5.0)
    assert drawn[0].get_suptitle() == "simulated, model version 7, Ascend910B2: no NPU was involved"


def test_a_picture_shows_chosen_cores_only(tmp_path, drawn):
    plot_timeline([report()], tmp_path / "plot.png", cores=("AIV0",))
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["AIV0 S", "AIV0 MTE2"]


def test_of_long_launches_and_of_many_the_first_part_is_shown_and_named(tmp_path, drawn):
    plot_timeline([report(us=66.0)] * 9, tmp_path / "plot.png")
    assert len(drawn[0].axes) == 8
    assert "66.0 µs, the first 20 µs" in drawn[0].axes[0].get_title(loc="left")
    assert drawn[0].axes[0].get_xlim() == (0.0, 20.0)
    assert drawn[0].get_suptitle().endswith("the first 8 of 9 launches")


def test_a_launch_without_events_is_an_empty_panel(tmp_path, drawn):
    plot_timeline([report(events=())], tmp_path / "plot.png")
    assert drawn[0].axes[0].get_title(loc="left").endswith("no events")


def test_without_matplotlib_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ToolchainError, match=r"matplotlib.*is not installed") as caught:
        plot_timeline([report()], tmp_path / "plot.png")
    assert caught.value.commands == ("pip install 'nsa-triton[bench]'",)
