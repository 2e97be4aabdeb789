"""The simulator's times against times that others measured on NPUs and published.

    python -m bench.simulator_published   # rewrites bench/results/ascend/simulator_published.csv; two to three minutes

The kernels are ours (simulator_kernels.py). Where the published one is a Triton kernel, ours computes the same with the
same tiles and the same grid; where it is written by hand, ours can only be compared roughly. The remarks say which.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsa_triton.ascend.simulator.costs import parameters
from nsa_triton.ascend.simulator.faults import SimulationError
from nsa_triton.ascend.simulator.report import LaunchReport
from nsa_triton.ascend.toolchain import Compiler, compilers
from nsa_triton.errors import CompileError
from nsa_triton.runtime.executors.simulator import SimulatorExecutor

from . import simulator_kernels as kernels
from .results import write_table

RESULTS = Path(__file__).parent / "results" / "ascend" / "simulator_published.csv"
COLUMNS = (
    "what", "shape", "dtype", "chip", "compiler", "published µs", "simulated µs", "simulated / published",
    "critical pipe", "model", "source", "remark",
)  # fmt: skip
B1, B2, B3, A3 = "Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910_9382"
VTRITON = "shane-kshongmo/vTriton"
PTO = "zouzias/pto-isa-mirror: kernels/manual/a2a3/gemm_performance/README.md"
ATTENTION = "pto-isa README (gitcode cann/pto-isa PR 885)"
LAUNCH = 118.0  # µs: what the host adds to the stream copies; all of up to 24 programs of 26 µs took 144 to 145 µs
SAME = "the same kernel: equal tiles and grid"
WARM = "measured again and again; simulated with the data in the L2"
HAND = "written by hand, with other overlaps"


@dataclass(frozen=True)
class Published:
    us: float
    source: str
    remark: str


@dataclass(frozen=True)
class Case:
    what: str
    shape: str
    dtype: torch.dtype
    chip: str
    published: tuple[Published, ...]
    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    versions: tuple[str, ...] = ()  # of the compilers, if not all


def tensors(dtype: torch.dtype, **shapes: Any) -> dict[str, torch.Tensor]:
    """Never read: their pages are never touched."""
    return {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}


def cases() -> Iterator[Case]:
    yield from rows()
    yield from vectors()
    yield from copies()
    yield from products()
    yield from attentions()


def rows(T: int = 8192, N: int = 2048) -> Iterator[Case]:
    """One row per program. The medians leave out the first launch."""

    def one(what: str, us: float, kernel: Any, file: str, remark: str, **arguments: Any) -> Case:
        published = Published(us, f"{VTRITON}: tests/perfbound/fixtures/{file}, msprof", f"{SAME}; {remark}")
        return Case(
            what, f"{T} x {N}", torch.float32, B3, (published,), kernel, T, {**arguments, "N": N, **more}, {"BN": N}
        )

    dtype, more = torch.float32, {}
    two = tensors(dtype, x=(T, N), y=(T, N))
    yield one(
        "softmax", 305.1, kernels.row_softmax, "softmax_op_summary_910b3.csv", "266 to 353", **two, x_stride=N,
        y_stride=N,
    )  # fmt: skip
    more = {"eps": 1e-6}
    three = {"x": two["x"], **tensors(dtype, w=N), "y": two["y"], "stride": N}
    yield one("rmsnorm", 607.8, kernels.row_rmsnorm, "rmsnorm_op_summary_910b3.csv", "515 to 703", **three)
    four = {"x": two["x"], **tensors(dtype, w=N, b=N), "y": two["y"], "stride": N}
    yield one("layernorm", 608.4, kernels.row_layernorm, "layernorm_op_summary_910b3.csv", "513 to 702", **four)


def vectors(tile: int = 2048) -> Iterator[Case]:
    for n, us in ((16 << 20, 307.0), (32 << 20, 605.3)):
        published = Published(
            us, f"{VTRITON}: .omc/research/hw_runs/RESULTS.md, msprof; tile: BloodOrange666/vTriton", SAME
        )
        yield Case(
            "add", f"{n >> 20}M, tiles of {tile}", torch.float32, B3, (published,), kernels.add_blocks, n // tile,
            {**tensors(torch.float32, x=n, y=n, z=n), "n": n}, {"BN": tile},
        )  # fmt: skip
    n, m, steps = 8 << 20, 64 << 10, 512
    published = Published(
        3289.6,
        f"{VTRITON}: .omc/research/hw_runs/seeded_serial/RESULTS.md, msprof",
        f"{SAME}; the final module was published too and is ours op by op",
    )
    yield Case(
        "copy, and a chain of multiply and add", f"{n >> 20}M, {steps} steps", torch.float32, B3, (published,),
        kernels.copy_and_chain, n // tile, {**tensors(torch.float32, x=n, y=n, a=m, b=m), "n": n, "m": m},
        {"STEPS": steps, "BN": tile},
    )  # fmt: skip


def copies() -> Iterator[Case]:
    sweep = f"{VTRITON}: tests/perfbound/fixtures/stream_copy_eta_sweep_910b3.json, host time less {LAUNCH:.0f} µs"
    for bytes_, us in (
        (128, 4430.5), (256, 2324.7), (512, 1253.7), (1024, 715.5), (2048, 442.8), (4096, 295.7), (8192, 226.6),
        (16384, 182.6), (32768, 174.3), (65536, 172.5),
    ):  # fmt: skip
        yield slabs(48, 512 << 10, bytes_, Published(us - LAUNCH, sweep, f"{SAME}; {WARM}"))
    sweep = f"{VTRITON}: tests/perfbound/fixtures/hbm_bw_sweep_910b3.json, host time less {LAUNCH:.0f} µs"
    for bytes_, us in ((2048, 1075.8), (8192, 543.3), (32768, 475.6), (65536, 462.7)):
        yield slabs(48, 1 << 20, bytes_, Published(us - LAUNCH, sweep, f"{SAME}; more than the L2 holds"))
    for programs, us in ((1, 144.3), (8, 144.0), (24, 145.0), (40, 149.0)):
        yield slabs(programs, 512 << 10, 32768, Published(us - LAUNCH, sweep, f"{SAME}; {WARM}"))
    yield slabs(64, 512 << 10, 32768, Published(305.5 - LAUNCH, sweep, f"{SAME}; more than the L2 holds"))
    n, tile = 128 << 20, 16 << 10
    published = Published(
        4 * n / 1267.1e3, "Ascend 910B1 hardware notes for AscendC, 2026-08: 1267.1 GB/s", "CANN's own copy"
    )
    yield Case(
        "copy", "256 MiB", torch.float16, B1, (published,), kernels.copy_tiles, 48,
        {**tensors(torch.float16, x=n, y=n), "n_tiles": n // tile}, {"BN": tile},
    )  # fmt: skip


def slabs(programs: int, size: int, tile_bytes: int, published: Published) -> Case:
    n = programs * size
    return Case(
        "copy", f"{programs} programs x {size}, tiles of {tile_bytes} bytes", torch.float32, B3, (published,),
        kernels.copy_slabs, programs, tensors(torch.float32, x=n, y=n), {"SIZE": size, "BN": tile_bytes // 4},
    )  # fmt: skip


def products() -> Iterator[Case]:
    tiles = {"BM": 128, "BN": 256, "BK": 256}
    for n, us in ((1536, 38.8), (3072, 206.7), (6144, 1506.0)):
        operands, result = tensors(torch.float16, a=(n, n), b=(n, n)), tensors(torch.float32, c=(n, n))
        yield Case(
            "a @ b.T", f"{n}^3, tiles of {'x'.join(map(str, tiles.values()))}", torch.float16, A3,
            (Published(us, PTO, f"{HAND}; the same tiles"),), kernels.matmul, 24,
            {**operands, **result, "M": n, "N": n, "K": n}, tiles,
        )  # fmt: skip


def attentions(D: int = 128) -> Iterator[Case]:
    """Longer ones were published too, up to 32768 tokens; they take the simulator a minute and more."""
    tiles = {"BM": 64, "BN": 256, "D": D}
    for S, pto, cann in ((1024, 20.96, 58.5), (2048, 32.5, 70.8), (4096, 88.9, 118.3), (8192, 292.6, 353.1)):
        published = (
            Published(pto, f"{ATTENTION}: PTO", HAND),
            Published(cann, f"{ATTENTION}: torch_npu", f"CANN's own, {HAND}"),
        )
        yield Case(
            "attention, one head", f"S={S} D={D}, tiles of {tiles['BM']}x{tiles['BN']}", torch.float16, B2, published,
            kernels.attention, min(24, S // tiles["BM"]),
            {**tensors(torch.float16, **dict.fromkeys("qkvy", (S, D))), "scale": D**-0.5, "S": S}, tiles, ("1.2.0",),
        )  # fmt: skip


def simulated(case: Case, compiler: Compiler) -> LaunchReport | str:
    """The report, or why there is none."""
    warm = any(WARM in published.remark for published in case.published)
    executor = SimulatorExecutor(case.chip, compiler, times=True, warm=warm)
    try:
        executor.launch(case.kernel, case.programs, case.arguments, case.constexprs, {})
    except (SimulationError, CompileError) as error:
        return f"not simulated: {error}"
    return executor.reports[0]


def table_rows(case: Case, compiler: Compiler) -> Iterator[tuple[str, ...]]:
    found = simulated(case, compiler)
    dtype = str(case.dtype).removeprefix("torch.")
    head = (case.what, case.shape, dtype, case.chip.removeprefix("Ascend"), compiler.version)
    for one in case.published:
        if isinstance(found, str):
            figures, remark = ("", "", ""), found
        else:
            figures, remark = (f"{found.us:.1f}", f"{found.us / one.us:.2f}", found.critical), one.remark
        yield (*head, f"{one.us:.1f}", *figures, parameters()["version"], one.source, remark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    output: Path = parser.parse_args().output
    table: list[tuple[str, ...]] = [COLUMNS]
    for case in cases():
        for compiler in compilers():
            if not case.versions or compiler.version in case.versions:
                for row in table_rows(case, compiler):
                    print(" | ".join(row[:9]), file=sys.stderr, flush=True)
                    table.append(row)
    write_table(output, table)


if __name__ == "__main__":
    main()
