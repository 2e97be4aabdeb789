"""Pictures of results: latency over length, speed-up over dense attention, roofline, bytes of decoding.

`nsa-triton plot` is its command line. Every picture comes in a light and a dark version; its title says whether times
were measured, and on what, or simulated.
"""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_triton.errors import ArgumentValueError, ToolchainError

from .rates import Rates, rates_of
from .results import Row, read

# Okabe and Ito: colours that everybody can tell apart; the dark ones are lighter.
COLOURS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B", "#000000"),
    "dark": ("#56B4E9", "#FF8C42", "#2ECC9B", "#E6A3CC", "#F0C050", "#9AD0F5", "#B0B0B0", "#C69C6D", "#FFFFFF"),
}
MARKERS = "osD^vP*Xh"
PAPER, INK, FAINT = "paper", "ink", "faint"
THEMES = {
    "light": {PAPER: "#FFFFFF", INK: "#1F2328", FAINT: "#D0D7DE"},
    "dark": {PAPER: "#0D1117", INK: "#E6EDF3", FAINT: "#3D444D"},
}
PROVIDERS = {
    "ours": "nsa_triton",
    "reference": "PyTorch reference",
    "sdpa": "dense attention (PyTorch)",
    "torch_npu": "CANN's operator",
    "simulated": "nsa_triton, simulated",
    "roofline": "least possible (roofline)",
}
OPS = {
    "nsa_compress": "Compression",
    "nsa_compress_grad": "Compression, gradient",
    "nsa_compress_attention": "Compressed attention",
    "nsa_compress_attention_grad": "Compressed attention, gradient",
    "nsa_select_attention": "Selected attention",
    "nsa_select_attention_grad": "Selected attention, gradient",
    "nsa_sliding_window_attention": "Sliding window",
    "nsa_sliding_window_attention_grad": "Sliding window, gradient",
    "nsa_gated_combine": "Gated sum",
    "nsa_gated_combine_grad": "Gated sum, gradient",
    "nsa_compress_infer": "Compression, decoding",
    "nsa_compress_attention_infer": "Compressed attention, decoding",
    "nsa_select_attention_infer": "Selected attention, decoding",
    "nsa_sliding_window_attention_infer": "Sliding window, decoding",
}
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
DPI = 150


@dataclass(frozen=True)
class Style:
    """A picture in the making: its theme and matplotlib."""

    theme: str
    pyplot: Any

    def colour(self, name: str) -> str:
        return THEMES[self.theme][name]

    def line(self, number: int) -> dict[str, Any]:
        """Colours come again after nine lines, with other markers."""
        turn, place = divmod(number, len(MARKERS))
        marker = MARKERS[(place + 4 * turn) % len(MARKERS)]
        return {"color": COLOURS[self.theme][place], "marker": marker, "markersize": 5}


def plotter() -> Any:
    """matplotlib, which only pictures need."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ToolchainError("plots need matplotlib", ["pip install 'nsa_triton[bench]'"]) from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def plot_all(results: Path, output: Path) -> list[Path]:
    """All pictures that the folder `results` has rows for, each in all themes, in the folders of `output`."""
    found = []
    for theme, colours in THEMES.items():
        pyplot = plotter()
        with pyplot.rc_context(_settings(colours)):
            found += list(_plotted(Style(theme, pyplot), results, output))
    if not found:
        hint = "Run nsa-triton bench first"
        raise ArgumentValueError("--results", "a folder with rows of nsa-triton bench", f"{results} without", hint)
    return found


def _settings(colours: dict[str, str]) -> dict[str, Any]:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours[INK])
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), colours[PAPER])
    return {
        **ink, **paper, "axes.edgecolor": colours[FAINT], "grid.color": colours[FAINT], "font.size": 11,
        "axes.titlesize": 12, "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.1,
    }  # fmt: skip


def _plotted(style: Style, results: Path, output: Path) -> Iterator[Path]:
    for file in sorted(results.glob("*/bench.csv")):
        rows = [row for row in read(file) if row.status == "ok" and row.cache != "warm"]
        for shape in dict.fromkeys(row.shape for row in rows):
            for name, draw in PICTURES.items():
                figure = draw(style, [row for row in rows if row.shape == shape])
                if figure is not None:
                    yield _saved(style, figure, output / file.parent.name / f"{name}-{shape}")
    decode_bytes = results / "ascend" / "decode_bytes.csv"
    if decode_bytes.exists():
        yield _saved(style, _decode_bytes(style, decode_bytes), output / "ascend" / "decode-bytes")


def _saved(style: Style, figure: Any, stem: Path) -> Path:
    path = stem.parent / f"{stem.name}-{style.theme}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    except OSError as error:
        hint = "Pass another folder with --output"
        raise ArgumentValueError(
            "--output", "a folder that can be written", f"{path}: {error.strerror}", hint
        ) from error
    finally:
        style.pyplot.close(figure)
    return path


# ---- what all pictures share ----


def _where(rows: Sequence[Row]) -> str:
    """On what, and whether that was measured; never left out of a title."""
    row = next((row for row in rows if row.simulated_us), rows[0])
    if row.simulated_us:
        return f"{row.target}, simulated, not measured"
    devices = dict.fromkeys(row.device for row in rows)  # threads of a CPU are part of it
    return f"measured on {' and '.join(devices)}, cold caches"


def _kind(rows: Sequence[Row]) -> str:
    return f"{rows[0].shape} shape, {rows[0].dtype}"


def _title(figure: Any, what: str, rows: Sequence[Row]) -> None:
    figure.suptitle(f"{what}\n{_kind(rows)}; {_where(rows)}", fontsize=13)


def _by_op(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """In the order in which a layer calls them, training before decoding."""
    found = _by(rows, lambda row: row.op)
    return {op: found[op] for op in OPS if op in found}


def _by(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _curve(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """Tokens and seconds of rows of one operator and provider, by length."""
    points = sorted((int(row.tokens), row.us * 1e-6) for row in rows if row.us is not None)
    return [tokens for tokens, _ in points], [seconds for _, seconds in points]


def _length_axis(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(lengths)), [_tokens(length) for length in sorted(set(lengths))])
    axes.minorticks_off()


def _whole_decades(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis whose ends have labels, however little the values differ."""
    axes.set_yscale("log")
    first, last = (round_(math.log10(end)) for round_, end in ((math.floor, min(values)), (math.ceil, max(values))))
    axes.set_ylim(10.0**first, 10.0 ** max(last, first + 1))
    axes.yaxis.set_minor_formatter(lambda *_: "")


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def _seconds(value: float, _: object = None) -> str:
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value / UNITS[-1][0]:g} {UNITS[-1][1]}"


def _one_distribution(rows: Sequence[Row]) -> list[Row]:
    """Of several index distributions the first: lines of different work must not be joined."""
    first: dict[tuple[str, str], str] = {}
    return [row for row in rows if first.setdefault((row.op, row.batch), row.indices) == row.indices]


# ---- the pictures ----


def _latency(style: Style, rows: Sequence[Row]) -> Any:
    """A panel per operator, a line per provider, a band from the 20th to the 80th percentile."""
    panels = _by_op(_one_distribution(rows))
    if max(len({row.tokens for row in panel}) for panel in panels.values()) < 2:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = style.pyplot.subplots(lines, columns, figsize=(4.4 * columns, 3.2 * lines + 1.2), squeeze=False)
    for axes, (op, panel) in zip(grid.flat, panels.items(), strict=False):
        for provider, same in _by(panel, lambda row: row.provider).items():
            _latency_line(style, axes, list(PROVIDERS).index(provider), same)
        _length_axis(axes, [int(row.tokens) for row in panel])
        _whole_decades(axes, [row.us * 1e-6 for row in panel if row.us])
        axes.yaxis.set_major_formatter(_seconds)
        axes.set_title(OPS[op])
        axes.set_xlabel(_sequences(panel))
        axes.set_ylabel("time per call")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    _title(figure, "Time over length", rows)
    return figure


def _latency_line(style: Style, axes: Any, number: int, rows: Sequence[Row]) -> None:
    provider = rows[0].provider
    tokens, seconds = _curve(rows)
    look = {**style.line(number), "linestyle": "--" if provider == "roofline" else "-"}
    axes.plot(tokens, seconds, label=PROVIDERS[provider], **look)
    if rows[0].p20_us:
        ordered = sorted(rows, key=lambda row: int(row.tokens))
        low, high = ([float(getattr(row, name)) * 1e-6 for row in ordered] for name in ("p20_us", "p80_us"))
        axes.fill_between(tokens, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _sequences(rows: Sequence[Row]) -> str:
    if rows[0].op.endswith("_infer"):
        return f"context of each of {rows[0].batch} sequences, tokens"
    return "length of the sequence, tokens"


def _speed_up(style: Style, rows: Sequence[Row]) -> Any:
    """How many times as fast as dense attention; training and decoding beside one another."""
    panels: dict[bool, dict[str, tuple[list[int], list[float]]]] = {False: {}, True: {}}
    for op, same in _by_op(_one_distribution(rows)).items():
        found = _ratios(same)
        if found[0]:
            panels[op.endswith("_infer")][op] = found
    panels = {decodes: ops for decodes, ops in panels.items() if ops}
    if not panels:
        return None
    figure, grid = style.pyplot.subplots(1, len(panels), figsize=(6.2 * len(panels), 5.6), squeeze=False)
    for axes, (decodes, ops) in zip(grid.flat, panels.items(), strict=True):
        for number, (op, (tokens, ratios)) in enumerate(ops.items()):
            axes.plot(tokens, ratios, label=OPS[op].removesuffix(", decoding"), **style.line(number))
        axes.axhline(1, color=style.colour(INK), linewidth=1, linestyle=":", label="as fast as dense attention")
        _length_axis(axes, [length for tokens, _ in ops.values() for length in tokens])
        _whole_decades(axes, [0.99, *(ratio for _, ratios in ops.values() for ratio in ratios)])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} ×")
        axes.set_xlabel(_sequences([row for row in rows if row.op in ops]))
        axes.set_ylabel("times as fast as dense attention")
        axes.set_title("Decoding" if decodes else "Training")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=1)
    _title(figure, "Each operator against dense causal attention", rows)
    return figure


def _ratios(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    of = {name: dict(zip(*_curve(same), strict=True)) for name, same in _by(rows, lambda row: row.provider).items()}
    ours, dense = of.get("ours", {}), of.get("sdpa", {})
    both = [tokens for tokens in ours if tokens in dense]
    return both, [dense[tokens] / ours[tokens] for tokens in both]


def _roofline(style: Style, rows: Sequence[Row]) -> Any:
    """Products per second over products per byte, below the roof of the device."""
    rates = rates_of(rows[0].target)
    timed = [row for row in _one_distribution(rows) if row.provider in ("ours", "simulated") and row.us]
    if rates is None or not timed:
        return None
    figure, axes = style.pyplot.subplots(figsize=(9.5, 5.8))
    intensities = [_intensity(row) for row in timed]
    ends = (min(intensities) / 4, max(*intensities, rates.flops / rates.bytes) * 4)
    corner = rates.flops / rates.bytes
    axes.plot((ends[0], corner, ends[1]), [_roof(rates, x) / 1e12 for x in (ends[0], corner, ends[1])],
              color=style.colour(INK), linewidth=1.5)  # fmt: skip
    axes.annotate(
        f"{rates.flops / 1e12:.0f} TFLOP/s", (ends[1], rates.flops / 1e12), (-4, 5), ha="right",
        textcoords="offset points",
    )  # fmt: skip
    middle = (ends[0] * corner) ** 0.5
    axes.annotate(
        f"{rates.bytes / 1e12:.1f} TB/s", (middle, _roof(rates, middle) / 1e12), (-8, 6), ha="right",
        textcoords="offset points",
    )  # fmt: skip
    for number, (op, same) in enumerate(_by_op(timed).items()):
        ordered = sorted(same, key=lambda row: int(row.tokens))
        speeds = [int(row.flops) / (row.us or 1) / 1e6 for row in ordered]
        look = {**style.line(number), "markersize": 8, "linewidth": 0.8}
        lengths = " to ".join(dict.fromkeys((_tokens(int(ordered[0].tokens)), _tokens(int(ordered[-1].tokens)))))
        axes.plot([_intensity(row) for row in ordered], speeds, label=f"{OPS[op]}, {lengths}", **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("FLOP per byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=10)
    _title(figure, "Roofline", rows)
    return figure


def _intensity(row: Row) -> float:
    return int(row.flops) / int(row.bytes)


def _roof(rates: Rates, intensity: float) -> float:
    return min(rates.flops, rates.bytes * intensity)


def _decode_bytes(style: Style, file: Path) -> Any:
    """Bars of bytes per decoded token, counted in compiled programs."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    figure, axes = style.pyplot.subplots(figsize=(8.5, 5))
    places = range(len(rows))
    dense = [_mebibytes(row["dense attention"]) for row in rows]
    axes.bar([x - 0.2 for x in places], dense, 0.38, label="dense attention", color=COLOURS[style.theme][6])
    below = [0.0] * len(rows)
    for number, part in enumerate(("selected attention", "compressed attention", "compression")):
        heights = [_mebibytes(row[part]) for row in rows]
        axes.bar(
            [x + 0.2 for x in places],
            heights,
            0.38,
            below,
            label=f"nsa_triton: {part}",
            color=COLOURS[style.theme][number],
        )
        below = [one + other for one, other in zip(below, heights, strict=True)]
    for x, (row, height) in enumerate(zip(rows, below, strict=True)):
        axes.annotate(
            f"÷ {row['dense ÷ all three']}", (x + 0.2, height), (0, 4), ha="center", textcoords="offset points"
        )
    axes.set_xticks(list(places), [_tokens(int(row["context"].replace(",", ""))) for row in rows])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("context, tokens (÷: how many times less than dense attention)")
    axes.set_ylabel("MiB moved per decoded token")
    axes.legend(
        loc="upper left", frameon=True, framealpha=1, edgecolor=style.colour(PAPER), facecolor=style.colour(PAPER)
    )
    figure.suptitle("Bytes per decoded token\npaper shape, bfloat16; counted in programs for Ascend910B2", fontsize=13)
    return figure


def _mebibytes(text: str) -> float:
    return float(text.removesuffix(" KiB").replace(",", "")) / 1024


PICTURES: dict[str, Callable[[Style, Sequence[Row]], Any]] = {
    "latency": _latency,
    "speed-up": _speed_up,
    "roofline": _roofline,
}
