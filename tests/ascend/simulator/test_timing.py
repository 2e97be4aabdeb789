"""What must hold of simulated times whatever the model's parameters are: proportions, limits, and limits reached."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from nsa_triton.ascend.simulator.costs import Costs
from nsa_triton.ascend.simulator.report import LaunchReport
from nsa_triton.ascend.toolchain import Compiler, compilers
from nsa_triton.runtime.executors.simulator import SimulatorExecutor
from tests.compiling import no_ascend

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

from tests.ascend.simulator import timing_kernels as kernels

CHIP = "Ascend910B1"
CORES, CUBES = 48, 24
TILE = 8192  # elements: 32 KiB
MIB = 1 << 18  # elements


@pytest.fixture(scope="module", params=compilers(), ids=lambda compiler: compiler.version)
def compiler(request: pytest.FixtureRequest) -> Compiler:
    found: Compiler = request.param
    return found


def timed(
    compiler: Compiler, kernel: Any, programs: int, arguments: dict[str, Any], constexprs: dict[str, int], **more: Any
) -> LaunchReport:
    executor = SimulatorExecutor(CHIP, compiler, times=True, **more)
    executor.launch(kernel, programs, arguments, constexprs, {})
    return executor.reports[0]


def copy(compiler: Compiler, n: int, programs: int = CORES, tile: int = TILE, **more: Any) -> LaunchReport:
    x, y = torch.empty(n), torch.empty(n)
    arguments = {"x": x, "y": y, "n_tiles": n // tile}
    return timed(compiler, kernels.copied, programs, arguments, {"BLOCK": tile}, **more)


def polynomial(compiler: Compiler, n: int, programs: int = CORES, terms: int = 8, **more: Any) -> LaunchReport:
    x, y = torch.empty(n), torch.empty(n)
    arguments = {"x": x, "y": y, "n_tiles": n // 2048}
    return timed(compiler, kernels.polynomial, programs, arguments, {"TERMS": terms, "BLOCK": 2048}, **more)


def product(compiler: Compiler, n: int, programs: int = CUBES, k: int = 0, **more: Any) -> LaunchReport:
    k = k or n
    a, b = torch.empty(n, k, dtype=torch.float16), torch.empty(k, n, dtype=torch.float16)
    arguments = {"a": a, "b": b, "c": torch.empty(n, n), "M": n, "N": n, "K": k}
    return timed(compiler, kernels.multiplied, programs, arguments, {"BM": 128, "BN": 256, "BK": 256}, **more)


def triangle(compiler: Compiler, n_tiles: int, programs: int, **more: Any) -> LaunchReport:
    a, b = torch.empty(n_tiles * 64, 64, dtype=torch.float16), torch.empty(n_tiles * 64, 64, dtype=torch.float16)
    arguments = {"a": a, "b": b, "y": torch.empty(n_tiles * 64, 64), "n_tiles": n_tiles}
    return timed(compiler, kernels.triangle, programs, arguments, {"BM": 64, "BN": 64, "BK": 64}, **more)


WORK: dict[str, Callable[..., LaunchReport]] = {
    "copy": lambda compiler, **more: copy(compiler, 96 * MIB, **more),
    "copy of small tiles": lambda compiler, **more: copy(compiler, 2 * MIB, tile=128, **more),
    "copy in two waves": lambda compiler, **more: copy(compiler, 180 * MIB, programs=60, **more),
    "polynomial": lambda compiler, **more: polynomial(compiler, 2 * MIB, terms=100, **more),
    "product": lambda compiler, **more: product(compiler, 1536, **more),
    "triangle": lambda compiler, **more: triangle(compiler, 72, programs=1, **more),
    "product of long rows": lambda compiler, **more: product(compiler, 768, programs=18, k=12288, **more),
}


@pytest.mark.parametrize("run", [copy, polynomial], ids=["memory", "vector unit"])
def test_twice_the_work_takes_twice_the_time(compiler: Compiler, run: Callable[..., LaunchReport]) -> None:
    launch, once, twice = (run(compiler, n, sampled=False).us for n in (0, 12 * MIB, 24 * MIB))
    assert (twice - launch) / (once - launch) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("run", [copy, polynomial], ids=["memory", "vector unit"])
def test_one_buffer_is_slower_than_two(compiler: Compiler, run: Callable[..., LaunchReport]) -> None:
    """On one core, which cannot fill the memory's queue."""
    two, one = (
        run(compiler, MIB // 2, programs=1, sampled=False, options={"multibuffer": on}).us for on in (True, False)
    )
    assert one > 1.05 * two


def test_a_copy_reaches_the_bandwidth(compiler: Compiler) -> None:
    """That of the HBM for as many bytes read as written, on all cores; what is copied does not fit in the L2."""
    n = 96 * MIB
    report = copy(compiler, n, sampled=False)
    costs = Costs(SimulatorExecutor(CHIP).chip)
    cycles = sum(4 * n / costs.shared_rate("HBM", direction) for direction in ("read", "write"))
    assert report.us == pytest.approx(cycles / costs.clock_hz * 1e6, rel=0.1)


def test_a_product_reaches_most_of_the_peak(compiler: Compiler) -> None:
    """Of 16 x 16 x 16 multiply-adds per cycle and cube."""
    report = product(compiler, 3072)
    costs = Costs(SimulatorExecutor(CHIP).chip)
    peak = 2 * 16**3 * CUBES * costs.clock_hz
    assert report.flops == 2 * 3072**3
    assert report.flops / (report.us * 1e-6) >= 0.7 * peak
    assert report.busy["AIC M"] >= 0.7


@pytest.mark.parametrize("name", WORK)
def test_nothing_is_faster_than_the_roofline(compiler: Compiler, name: str) -> None:
    report = WORK[name](compiler, sampled=False)
    assert 0 < report.roofline <= 1
    assert all(0 <= share <= 1 for share in (*report.busy.values(), *report.shared.values()))


def test_a_load_does_not_wait_for_a_later_store(compiler: Compiler) -> None:
    """One core that moves very little at a time: its pipes are idle but for the tiles themselves."""
    report = copy(compiler, MIB // 16, programs=1, tile=32, sampled=False)
    assert report.busy["AIV MTE2"] < 0.05


@pytest.mark.parametrize("name", WORK)
def test_samples_of_a_loop_stand_for_all_of_it(compiler: Compiler, name: str) -> None:
    few, all_ = (WORK[name](compiler, sampled=sampled) for sampled in (True, False))
    assert few.us == pytest.approx(all_.us, rel=0.05)
    assert few.flops == all_.flops
    assert {level: pytest.approx(count, rel=0.05) for level, count in all_.bytes.items()} == few.bytes


@pytest.mark.parametrize(
    ("run", "size", "cores"),
    [
        pytest.param(copy, 12 * MIB, CORES, id="memory"),
        pytest.param(polynomial, 2 * MIB, CORES, id="vector unit"),
        pytest.param(product, 1536, CUBES, id="cube"),
    ],
)
def test_more_cores_are_not_slower(compiler: Compiler, run: Callable[..., LaunchReport], size: int, cores: int) -> None:
    times = [run(compiler, size, programs=count).us for count in (1, 2, cores // 4, cores // 2, cores)]
    assert all(more <= 1.02 * fewer for fewer, more in pairwise(times))
    assert times[0] > 1.9 * times[1]
