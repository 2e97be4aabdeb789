"""No kernel has become dearer, or cheaper, without anybody saying so.

Instructions, on-chip bytes and simulated cycles are the same on every machine: what differs was changed.
"""

from __future__ import annotations

import pytest

from nsa_triton.ascend.toolchain import compilers, front_end_problem

if front_end_problem() is not None or not compilers():
    pytest.skip(f"no Ascend toolchain: {front_end_problem() or 'no ascendnpu-ir'}", allow_module_level=True)

from bench.baseline import ALLOWED, COMMAND, cycles, differences, programs, read

KEPT = read()
INSTALLED = {version.version: version for version in compilers()}


def told(lines: list[str]) -> str:
    return "\n".join([f"if this is meant, run: {COMMAND}", *lines])


@pytest.mark.parametrize("version", KEPT)
@pytest.mark.parametrize("recomputed", [programs, cycles])
def test_no_figure_has_moved(version, recomputed):
    if version not in INSTALLED:
        pytest.skip(f"ascendnpu-ir {version} is not installed")
    found = recomputed(INSTALLED[version], lambda what: None)
    assert found
    kept = {name: figures for name, figures in KEPT[version].items() if is_cycles(figures) == (recomputed is cycles)}
    lines = differences(kept, found)
    assert not lines, told(lines)


def is_cycles(figures: dict[str, float]) -> bool:
    return all(name.startswith("simulated cycles") for name in figures)


def test_a_figure_that_moves_names_its_kernel():
    kept = {"first": {"UB bytes": 1000, "cycles": 0}, "second": {"UB bytes": 1000}}
    more, less = 1000 * (1 + 1.01 * ALLOWED), 1000 * (1 - 1.01 * ALLOWED)
    assert differences(kept, {**kept, "second": {"UB bytes": 1000 * (1 + 0.99 * ALLOWED)}}) == []
    assert differences(kept, {**kept, "second": {"UB bytes": more}}) == [f"second: UB bytes 1000 -> {more:g}"]
    assert differences(kept, {**kept, "second": {"UB bytes": less}}) == [f"second: UB bytes 1000 -> {less:g}"]
    assert differences(kept, {**kept, "first": {"UB bytes": 1000, "cycles": 1}}) == ["first: cycles 0 -> 1"]
    assert differences(kept, {"first": kept["first"]}) == ["second: only in the baseline"]
    assert differences({}, {"third": {}}) == ["third: only in the new figures"]
    assert COMMAND in told(["anything"])
