"""What a simulated launch took, and why: time, how busy each pipe was, bytes per memory, costs by source line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_triton.ascend.simulator.clock import Event, Timing
from nsa_triton.ascend.simulator.instruction import PIPES

TOP = 10  # source lines


@dataclass(frozen=True)
class LaunchReport:
    """One launch of one kernel, simulated: no figure in it was measured on an NPU.

    model      version of the timing model (chips.json)
    us         estimated time, from the launch to the end of the last block
    busy       share of the time that each pipe works, "AIV V": mean over the cores that ran
    shared     share of the time that "HBM" and "L2" serve requests
    critical   the busiest of them all
    roofline   the least time that bytes over HBM bandwidth and products over the cube's peak allow, as a share of `us`
    bytes      "HBM read": bytes, and so on
    lines      the source lines with the most busy cycles, as shares of all
    """

    kernel: str
    chip: str
    compiler: str
    model: str
    blocks: int
    us: float
    busy: Mapping[str, float]
    shared: Mapping[str, float]
    critical: str
    roofline: float
    bytes: Mapping[str, int]
    flops: int
    lines: Mapping[str, float]
    events: tuple[Event, ...] = ()
    cycles_per_us: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {"simulated": True, **{name: value for name, value in vars(self).items() if name != "events"}}


def launch_report(timing: Timing, kernel: str, compiler: str, blocks: int) -> LaunchReport:
    costs = timing.costs
    cycles = timing.cycles
    seconds = cycles / costs.clock_hz
    bytes_ = {f"{level} {direction}": count for (level, direction), count in sorted(timing.memory.bytes.items())}
    busy = _busy(timing, cycles)
    shared = {level: timing.memory.service[level] / cycles for level in ("HBM", "L2")}
    critical = max({**busy, **shared}.items(), key=lambda item: item[1])[0]
    hbm = sum(count for name, count in bytes_.items() if name.startswith("HBM"))
    cube = {"f32": costs["cube_depth_32"]}
    products = {name.removeprefix("products of "): count for name, count in timing.work.items() if "products" in name}
    per_depth = costs["cube_rows"] ** 2 * timing.chip.cube_cores
    cube_cycles = sum(n / per_depth / cube.get(kind, costs["cube_depth_16"]) for kind, n in products.items())
    least = max(hbm / costs.hbm_bytes_per_cycle, cube_cycles)
    total = sum(timing.lines.values())
    top = sorted(timing.lines.items(), key=lambda item: -item[1])[:TOP]
    return LaunchReport(
        kernel=kernel,
        chip=timing.chip.name,
        compiler=compiler,
        model=costs.version,
        blocks=blocks,
        us=seconds * 1e6,
        busy=busy,
        shared=shared,
        critical=critical,
        roofline=least / cycles,
        bytes=bytes_,
        flops=2 * sum(products.values()),
        lines={line: cost / total for line, cost in top if line},
        events=tuple(timing.events),
        cycles_per_us=costs.clock_hz / 1e6,
    )


def _busy(timing: Timing, cycles: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for role in ("AIC", "AIV"):
        clocks = [clock for clock in timing.clocks if clock.role == role]
        for pipe in PIPES:
            total = sum(clock.busy[pipe] for clock in clocks)
            if total:
                found[f"{role} {pipe}"] = total / timing.cores(role) / cycles
    return found


def total_us(reports: Sequence[LaunchReport]) -> float:
    return sum(report.us for report in reports)
