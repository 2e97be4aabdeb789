"""nsa-triton bench and plot as a user meets them, and the pages that name their commands."""

from __future__ import annotations

import importlib
import json
import re

import pytest

from bench.cases import PROVIDERS
from bench.plot import OPS as OP_NAMES
from bench.plot import PROVIDERS as PROVIDER_NAMES
from bench.plot import THEMES
from bench.results import ResultFile, Row
from nsa_triton.ascend.toolchain import host_problem
from nsa_triton.cli import main, parser
from nsa_triton.workloads import OPS, SHAPES
from tests.readme import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        (["nsa_dream"], OPS),
        (["--shape", "papr"], SHAPES),
        (["--providers", "flash"], PROVIDERS),
        (["--indices", "uniform"], ["random", "scores", "local"]),
        (["--lengths", "7"], ["--lengths", "32"]),
        (["--chip", "Ascend1"], ["Ascend910B2"]),
        (["nsa_compress", "--providers", "sdpa"], ["nsa_compress"]),
        (["--providers", "roofline", "--target", "cpu"], ["bench/rates.py knows no rates of cpu"]),
    ],
)
def test_bad_arguments_name_the_valid_ones(arguments, valid, tmp_path, capsys):
    assert main(["bench", *arguments, "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in valid), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(host_problem() is not None, reason=f"the CPU target cannot run: {host_problem()}")
def test_bench_prints_a_table_and_json(tmp_path, capsys):
    case = ["bench", "nsa_compress", "--target", "cpu", "--shape", "gqa-d64-g4", "--lengths", "64"]
    case += ["--output", str(tmp_path)]
    assert main([*case, "--quick"]) == 0
    said = capsys.readouterr().out
    assert "nsa_compress gqa-d64-g4, 64 tokens" in said
    assert re.search(r"ours .*(µs|ms).*–.*(µs|ms)", said)
    assert "without roofline" in said
    assert main([*case, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["provider"], row["cache"]) for row in rows} == {
        (provider, cache) for provider in ("ours", "reference") for cache in ("cold", "warm")
    }
    assert sorted(path.name for path in (tmp_path / "cpu").iterdir()) == ["bench.csv", "quick.csv"]


def test_bench_says_where_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "nsa_compress", "--providers", "reference", "--output", str(tmp_path / "file")]) == 2
    assert "--output: expected a folder that can be written" in capsys.readouterr().err


# ---- pictures ----


def rows(target: str, provider: str, **figures: str) -> list[Row]:
    kind = {"shape": "paper", "dtype": "bfloat16", "batch": "1", "indices": "", "flops": "4000000", "bytes": "100000"}
    return [
        Row(provider, "ok", op, tokens=str(tokens), target=target, device=target, **kind, **figures)
        for op in OPS
        for tokens in (1024, 4096)
    ]


def result_file(folder, found) -> None:
    file = ResultFile(folder, "bench", resume=False)
    file.append(found)
    file.finish()


def test_pictures_come_light_and_dark(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bench.plot.DPI", 30)
    times = {"cache": "cold", "p20_us": "9", "p50_us": "10", "p80_us": "11"}
    measured = [*rows("nvidia-h200", "ours", **times), *rows("nvidia-h200", "sdpa", **times)]
    result_file(tmp_path / "nvidia-h200", measured)
    result_file(tmp_path / "simulated-Ascend910B2", rows("Ascend910B2", "simulated", simulated_us="12.5"))
    assert main(["plot", "--results", str(tmp_path), "--output", str(tmp_path / "pictures")]) == 0
    found = {str(path.relative_to(tmp_path / "pictures")) for path in tmp_path.glob("pictures/*/*.png")}
    named = {
        "nvidia-h200": ("latency", "speed-up", "roofline"),
        "simulated-Ascend910B2": ("latency", "roofline"),
    }
    assert found == {
        f"{folder}/{name}-paper-{theme}.png" for folder, names in named.items() for name in names for theme in THEMES
    }
    assert capsys.readouterr().out.count("wrote ") == len(found)


@pytest.mark.parametrize("shown", [1, 3, len(OPS)])
def test_the_heading_lies_above_the_panels_and_the_legend_below(shown):
    pytest.importorskip("matplotlib")
    from bench.plot import Style, _latency, _settings, plotter

    pyplot = plotter()
    with pyplot.rc_context(_settings(THEMES["light"])):
        found = rows("cpu", "ours", cache="cold", p20_us="9", p50_us="10", p80_us="11")[: 2 * shown]
        figure = _latency(Style("light", pyplot), found)
        figure.draw_without_rendering()
        boxes = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible()]
        assert len(boxes) == shown
        assert figure._suptitle.get_window_extent().y0 >= max(box.y1 for box in boxes)
        assert figure.legends[0].get_window_extent().y1 <= min(box.y0 for box in boxes)
        pyplot.close(figure)


@pytest.mark.parametrize("theme", THEMES)
def test_no_two_operators_look_alike(theme):
    from bench.plot import Style

    looks = [Style(theme, None).line(number) for number in range(len(OPS))]
    assert len({(look["color"], look["marker"]) for look in looks}) == len(OPS)


def test_titles_say_what_was_measured_and_what_not():
    from bench.plot import _where

    assert _where(rows("Ascend910B2", "simulated", simulated_us="1")) == "Ascend910B2, simulated, not measured"
    assert _where(rows("cpu", "ours", p50_us="1")) == "measured on cpu, cold caches"


def test_pictures_have_names_for_people():
    assert set(OP_NAMES) == set(OPS)
    assert set(PROVIDER_NAMES) == set(PROVIDERS)
    assert not any("_" in name for name in OP_NAMES.values())


def test_plot_without_results_says_what_to_do(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", "--results", str(tmp_path)]) == 2
    assert "Run nsa-triton bench first" in capsys.readouterr().err


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch, capsys):
    real = importlib.import_module

    def without(name, package=None):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    assert main(["plot", "--results", str(tmp_path)]) == 2
    assert "pip install 'nsa_triton[bench]'" in capsys.readouterr().err


# ---- the page ----


def commands() -> list[str]:
    return re.findall(r"^\s*(nsa-triton (?:bench|plot)[^#\n]*)", PAGE.read_text(), re.MULTILINE)


def test_the_page_names_commands_that_exist():
    assert len(commands()) > 4
    for command in commands():
        parser().parse_args(command.split()[1:])


def test_the_page_links_to_files_that_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text())
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_the_page_names_modules_that_exist():
    for module in re.findall(r"python -m ([\w.]+)", PAGE.read_text()):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_page_explains_every_provider_and_column():
    text = PAGE.read_text()
    assert all(f"`{provider}`" in text for provider in PROVIDERS)
    assert all(f"`{column}`" in text for column in Row.__dataclass_fields__)
