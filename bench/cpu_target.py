"""How fast the CPU target is: matrix tiles against torch.mm, launch overhead, compile times. Writes a CSV.

    python -m bench.cpu_target

Times are medians, on whatever machine this is; only the ratio to torch.mm in the same run carries over to another. CPU
numbers say nothing of NPU numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nsa_triton.ascend.lower import Specialization, signature_of
from nsa_triton.ascend.native import NativeKernel, compile_object, native_kernel
from nsa_triton.runtime.executors.host import HostExecutor

from .kernels import add_one, repeated_dot
from .results import write_table

RESULTS = Path(__file__).parent / "results" / "cpu" / "cpu_target.csv"
COLUMNS = ("measured", "nsa_triton", "torch, same run", "ratio")
M, N, K = 64, 64, 128  # the tile of one dot: queries x keys x head size
STEPS = 200
ROUNDS = 15


def median_seconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def native(kernel: object, arguments: dict[str, Tensor | int], constexprs: dict[str, object]) -> NativeKernel:
    return native_kernel(Specialization(kernel, signature_of(arguments), constexprs))


def matrix_row(dtype: torch.dtype, transposed: bool) -> tuple[str, str, str, str]:
    """One thread of ours against one thread of torch.mm on the same tile, alternating."""
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    right = b if transposed else b.t().contiguous()
    c, flops = torch.empty(M, N), 2 * M * N * K * STEPS
    arguments: dict[str, Tensor | int] = {"a": a, "b": right, "c": c, "n_steps": STEPS}
    kernel = native(repeated_dot, arguments, {"M": M, "N": N, "K": K, "TRANS": transposed})
    values = list(arguments.values())
    wide, turned, out = a.float(), b.t().float().contiguous(), torch.empty(M, N)

    def theirs() -> None:
        for _ in range(STEPS):
            torch.mm(wide, turned, out=out)

    ours_s, theirs_s = [], []
    for _ in range(ROUNDS):
        ours_s.append(median_seconds(lambda: kernel.run(1, values, 1), rounds=1))
        theirs_s.append(median_seconds(theirs, rounds=1))
    if not torch.allclose(c, STEPS * (a.float() @ b.float().t()), rtol=1e-3, atol=1e-2):
        raise SystemExit("the dot is wrong; not timing it")
    ours, other = flops / statistics.median(ours_s) / 1e9, flops / statistics.median(theirs_s) / 1e9
    name = f"tl.dot {M}×{K}×{N}, {str(dtype).removeprefix('torch.')}{', tl.trans(b)' if transposed else ''}, one thread"
    return name, f"{ours:.0f} GFLOP/s", f"{other:.0f} GFLOP/s (float32 torch.mm)", f"{ours / other:.2f}"


def launch_row() -> tuple[str, str, str, str]:
    x, y = torch.randn(16), torch.empty(16)
    executor = HostExecutor()

    def ours() -> None:
        executor.launch(add_one, 1, {"x": x, "y": y, "n": 16}, {}, {})

    def theirs() -> None:
        torch.add(x, 1.0, out=y)

    both = [median_seconds(call, rounds=2000) * 1e6 for call in (ours, theirs)]
    return "launch of a warm kernel", f"{both[0]:.0f} µs", f"{both[1]:.0f} µs (torch.add)", f"{both[0] / both[1]:.1f}"


def compile_row() -> tuple[str, str, str, str]:
    arguments: dict[str, Tensor | int] = {"x": torch.randn(16), "y": torch.empty(16), "n": 16}
    spec = Specialization(add_one, signature_of(arguments), {})
    seconds = median_seconds(lambda: compile_object(spec), rounds=5)
    return "lower and compile a small kernel", f"{seconds:.2f} s", "", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    rows = [matrix_row(dtype, transposed) for dtype in dtypes for transposed in (False, True)]
    rows += [launch_row(), compile_row()]
    write_table(output, [COLUMNS, *rows])
    for row in (COLUMNS, *rows):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
