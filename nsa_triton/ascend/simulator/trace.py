"""Show when things happened in a simulated launch: a trace for ui.perfetto.dev or chrome://tracing, and a picture.

Both need reports with events (`keeps_events`). Of long loops, a sampled run has the events of some rounds only.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nsa_triton.ascend.simulator.clock import Event
from nsa_triton.ascend.simulator.report import LaunchReport
from nsa_triton.errors import ToolchainError

PIPES = ("S", "MTE2", "MTE1", "M", "FIX", "V", "MTE3")  # who issues, then the way of the data: in, products, out
CORES = ("AIC", "AIV0", "AIV1")  # of one block
MOST_PANELS = 8
MOST_US = 20.0  # of a launch that a panel shows: beyond that, the bars become too thin to tell apart
THIN = 0.002  # of the time that a panel shows: shorter bars get an outline of their own colour, or they would vanish

# Okabe and Ito: colours that everybody can tell apart.
_COLOURS = {
    "S": "#999999", "MTE2": "#0072B2", "MTE1": "#56B4E9", "M": "#D55E00", "FIX": "#CC79A7", "V": "#009E73",
    "MTE3": "#E69F00",
}  # fmt: skip
_DOES = {
    "S": "scalar unit", "MTE2": "GM to UB or L1", "MTE1": "L1 to L0", "M": "cube", "FIX": "L0C to GM",
    "V": "vector unit", "MTE3": "UB to GM",
}  # fmt: skip

Track = tuple[str, str]  # core and pipe


def write_trace(reports: Sequence[LaunchReport], path: Path) -> None:
    """A process per launch, a thread per pipe of each core. Names and times are the program's, in Chrome's format."""
    tids = itertools.count(1)  # Perfetto wants them different across processes, too
    events = [event for pid, report in enumerate(reports, 1) for event in _trace_events(report, pid, tids)]
    content = {"traceEvents": events, "displayTimeUnit": "ns", "otherData": _provenance(reports)}
    path.write_text(json.dumps(content, separators=(",", ":")))


def _provenance(reports: Sequence[LaunchReport]) -> dict[str, Any]:
    def all_of(values: Iterator[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    return {
        "simulated": True,
        "model version": all_of(report.model for report in reports),
        "chip": all_of(report.chip for report in reports),
        "compiler": all_of(f"ascendnpu-ir {report.compiler}" for report in reports),
    }


def _trace_events(report: LaunchReport, pid: int, tids: Iterator[int]) -> Iterator[dict[str, Any]]:
    threads = {track: next(tids) for track in sorted({_track(event) for event in report.events}, key=_order)}
    title = f"{report.kernel}, {report.chip}, ascendnpu-ir {report.compiler}, simulated"
    yield _metadata("process_name", pid, name=title)
    yield _metadata("process_sort_index", pid, sort_index=pid)
    for (core, pipe), tid in threads.items():
        yield _metadata("thread_name", pid, tid, name=f"{core} {pipe}")
        yield _metadata("thread_sort_index", pid, tid, sort_index=tid)
    for event in report.events:
        start, end = (round(cycles / report.cycles_per_us, 3) for cycles in (event.start, event.end))
        arguments = {"source": event.source, "cycles": round(event.end - event.start, 1)}
        yield {
            "ph": "X", "pid": pid, "tid": threads[_track(event)], "name": event.name, "ts": start,
            "dur": round(end - start, 3), "args": arguments,
        }  # fmt: skip


def _metadata(what: str, pid: int, tid: int = 0, **arguments: str | int) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": arguments}


def _track(event: Event) -> Track:
    return event.core, event.pipe


def _order(track: Track) -> tuple[int, str, int]:
    """Of tracks: by the number of the block, then the core, then the way of the data."""
    block, core = _parts(track[0])
    return block, core, PIPES.index(track[1])


def _parts(core: str) -> tuple[int, str]:
    """`block 3 AIV0` is AIV0 of block 3."""
    _, block, name = core.split()
    return int(block), name


# ---- the picture ----


def matplotlib_figure() -> Any:
    """matplotlib's Figure, which draws without a display; a ToolchainError where matplotlib is missing."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise ToolchainError(
            "matplotlib, which draws the timeline, is not installed", ("pip install 'nsa-triton[bench]'",)
        ) from None


def plot_timeline(reports: Sequence[LaunchReport], path: Path, cores: Sequence[str] = CORES) -> None:
    """A PNG: a panel per launch, of which there is one at least, and in it a row per pipe of one block's cores: of the
    block with the most instructions. Of long launches and of many, the first part is shown, and the titles say so."""
    shown = [(report, _rows(report, cores)) for report in reports[:MOST_PANELS]]
    heights = [max(1, len(rows)) for _, rows in shown]
    inches = 0.9 + sum(0.9 + 0.32 * height for height in heights)
    figure = matplotlib_figure()(figsize=(14, inches), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (report, rows) in zip(panels, shown, strict=True):
        _draw(axes, report, rows)
    figure.suptitle(_headline(reports, len(shown)), x=0.01, ha="left", fontsize=14, fontweight="bold")
    _legend(figure, {pipe for _, rows in shown for _, pipe in rows})
    figure.savefig(path, format="png", dpi=120)


def _headline(reports: Sequence[LaunchReport], shown: int) -> str:
    chips = ", ".join(dict.fromkeys(report.chip for report in reports))
    models = ", ".join(dict.fromkeys(report.model for report in reports))
    part = f"; the first {shown} of {len(reports)} launches" if shown < len(reports) else ""
    return f"simulated, model version {models}, {chips}: no NPU was involved{part}"


def _rows(report: LaunchReport, cores: Sequence[str]) -> dict[Track, list[Event]]:
    """The events of the busiest block, by core and pipe."""
    blocks: dict[int, dict[Track, list[Event]]] = defaultdict(lambda: defaultdict(list))
    for event in report.events:
        block, core = _parts(event.core)
        if core in cores:
            blocks[block][_track(event)].append(event)
    busiest = max(blocks.values(), key=lambda rows: sum(map(len, rows.values())), default={})
    return {track: busiest[track] for track in sorted(busiest, key=_order)}


def _draw(axes: Any, report: LaunchReport, rows: dict[Track, list[Event]]) -> None:
    end = min(report.us, MOST_US)
    for row, ((_, pipe), events) in enumerate(rows.items()):
        times = [(event.start / report.cycles_per_us, event.end / report.cycles_per_us) for event in events]
        bars = [(start, stop - start) for start, stop in times if start < end]
        outlines = [_COLOURS[pipe] if width < THIN * end else "white" for _, width in bars]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolor=_COLOURS[pipe], edgecolor=outlines, linewidth=0.4)
    _label(axes, report, list(rows), end)


def _label(axes: Any, report: LaunchReport, tracks: Sequence[Track], end: float) -> None:
    what = f"{report.kernel}, ascendnpu-ir {report.compiler}: {report.us:.1f} µs"
    part = f", the first {end:.0f} µs" if end < report.us else ""
    block = f"; block {_parts(tracks[0][0])[0]} of {report.blocks}" if tracks else "; no events"
    axes.set_title(what + part + block, loc="left", fontsize=12)
    axes.set_yticks(range(len(tracks)), [f"{_parts(core)[1]} {pipe}" for core, pipe in tracks], fontsize=10)
    axes.set_ylim(len(tracks) - 0.4, -0.6)
    axes.set_xlim(0, end)
    axes.set_xlabel("µs since the launch", fontsize=10)
    axes.tick_params(axis="x", labelsize=10)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for row in range(1, len(tracks)):
        if tracks[row][0] != tracks[row - 1][0]:
            axes.axhline(row - 0.5, color="#666666", linewidth=0.8)


def _legend(figure: Any, pipes: set[str]) -> None:
    patch = importlib.import_module("matplotlib.patches").Patch
    handles = [patch(color=_COLOURS[pipe], label=f"{pipe}: {_DOES[pipe]}") for pipe in PIPES if pipe in pipes]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles) or 1, fontsize=10, frameon=False)
