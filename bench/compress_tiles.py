"""Measure the tiles of compress on this CPU and write autotune_configs/cpu/compress.json.

    python -m bench.compress_tiles

Every candidate is first held against the default tiles' result, then all candidates of a kernel take turns, so that a
busy machine slows them alike. The entries hold medians; only their ratios carry over to another machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nsa_triton.ascend.toolchain import distribution_version
from nsa_triton.ops.compress import launch
from nsa_triton.runtime.configs import SCHEMA, Config, config_root
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import target_of

TOKENS, HEADS, BLOCK, STRIDE = 8192, 4, 32, 16
SHAPES = [(torch.bfloat16, 128), (torch.bfloat16, 192), (torch.float32, 128), (torch.float32, 192)]
CANDIDATES = {
    kernel: [{"BT": tokens, "BD": columns} for tokens in (16, 32, 64, 128, 256, 512) for columns in (64, 128, 256)]
    for kernel in ("compress_fwd", "compress_bwd_dx", "compress_bwd_dw")
}
ROUNDS = 9


class TriedPlan(launch.Plan):
    """A plan whose tiles are given instead of looked up."""

    tiles: Mapping[str, int] | None = None

    def config(self, kernel: str) -> Config:
        found = super().config(kernel)
        tried = self.tiles if self.tiles is not None and set(self.tiles) == set(found.tiles) else found.tiles
        return dataclasses.replace(found, tiles=tried)


def makers(plan: TriedPlan) -> dict[str, tuple[torch.Tensor, Callable[[], tuple[Launch, ...]]]]:
    """For every kernel: what it computes, and the launches that do."""
    shape = (plan.tokens, plan.heads, plan.head_dim)
    x, w = torch.randn(shape).to(plan.dtype), torch.randn(BLOCK, plan.heads).to(plan.dtype)
    y, dx, dw = torch.empty(plan.windows.rows, *shape[1:], dtype=plan.dtype), torch.empty_like(x), torch.empty_like(w)
    g = torch.randn(y.shape).to(plan.dtype)
    return {
        "compress_fwd": (y, lambda: (launch.plan_forward(plan, x, w, y),)),
        "compress_bwd_dx": (dx, lambda: (launch.plan_input_grad(plan, g, w, dx),)),
        "compress_bwd_dw": (dw, lambda: launch.plan_weight_grad(plan, g, x, dw)),
    }


def best(plan: TriedPlan, kernel: str) -> tuple[Mapping[str, int], dict[str, float]]:
    """The fastest tiles, and the evidence. The others must agree with the first candidate, the default."""
    output, make = makers(plan)[kernel]
    plan.tiles = None
    tried: list[tuple[Mapping[str, int], tuple[Launch, ...], list[float]]] = []
    for tiles in (plan.config(kernel).tiles, *CANDIDATES[kernel]):
        plan.tiles = tiles
        tried.append((tiles, make(), []))
        seconds(tried[-1][1])
        if len(tried) == 1:
            expected = output.clone()
        elif not torch.allclose(output.float(), expected.float(), rtol=2e-2, atol=2e-2):
            raise SystemExit(f"{kernel} with {tiles} is wrong; nothing was written")
    for _ in range(ROUNDS):
        for _, launches, times in tried:
            times.append(seconds(launches))
    default = statistics.median(tried[0][2])
    tiles, _, times = min(tried, key=lambda one: statistics.median(one[2]))
    p20, p50, p80 = (sorted(times)[int(share * (ROUNDS - 1))] for share in (0.2, 0.5, 0.8))
    evidence = {"p20_us": p20, "p50_us": p50, "p80_us": p80, "default_p50_us": default}
    return tiles, {name: round(value * 1e6, 1) for name, value in evidence.items()}


def seconds(launches: tuple[Launch, ...]) -> float:
    target, device = target_of(torch.device("cpu")), torch.device("cpu")
    began = time.perf_counter()
    for planned in launches:
        planned.run(target, device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=config_root() / "cpu" / "compress.json", help="default: %(default)s"
    )
    output: Path = parser.parse_args().output
    versions = {name: distribution_version(name) for name in ("torch", "triton-ascend", "ascendnpu-ir", "llvmlite")}
    entries: list[dict[str, Any]] = []
    for dtype, head_dim in SHAPES:
        x = torch.empty((TOKENS, HEADS, head_dim), dtype=dtype)
        plan = TriedPlan(target_of(x.device), launch.Windows((TOKENS,), BLOCK, STRIDE), x)
        for kernel in CANDIDATES:
            tiles, evidence = best(plan, kernel)
            key = {"itemsize": dtype.itemsize, "head_dim": head_dim, "block": BLOCK, "stride": STRIDE}
            shape = f"T={TOKENS} N={HEADS} {str(dtype).removeprefix('torch.')}"
            found = {"how": "measured", "shape": shape, **evidence, "threads": torch.get_num_threads(), **versions}
            entries.append(
                {"kernel": kernel, "key": key, "length": 0, "tiles": dict(tiles), "options": {}, "evidence": found}
            )
            print(kernel, key, tiles, f"{evidence['default_p50_us'] / evidence['p50_us']:.2f} x default")
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
    head = f'{{\n  "schema": {SCHEMA},\n  "op": "{launch.OP}",\n  "target": "cpu",\n  "entries": [\n'
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f"{head}{lines}\n  ]\n}}\n")


if __name__ == "__main__":
    main()
