"""A whole attention layer against a dense one: a training step, and decoding token by token.

    python -m bench.end_to_end                            # on the fastest device that is here
    python -m bench.end_to_end --lengths 1024 4096 --shape gqa-d64-g16 --target cpu

Both layers have projections of the same sizes and run in one process, in turns. `ours` is NativeSparseAttention with
its kernels; `dense` is causal scaled_dot_product_attention over all tokens, decoding from a cache of consecutive keys
and values. A training step is forward and backward of one sequence; decoding is one token for each of a few sequences,
after a prompt of the given length. What decodes otherwise than it attends in one pass is not timed.

Rows go into bench/results/<target>/end_to_end.csv, or below --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nsa_triton import NativeSparseAttention, NSACache, NSAConfig
from nsa_triton.errors import ArgumentValueError
from nsa_triton.runtime.target import present_targets
from nsa_triton.workloads import SHAPES, Shape, shape_named

from .results import write_table
from .run import Session
from .timing import percentile

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "what", "provider", "shape", "tokens", "sequences", "dtype", "p20_ms", "p50_ms", "p80_ms", "rounds", "× dense",
    "target", "device", "torch", "triton", "nsa_triton", "commit",
)  # fmt: skip
HIDDEN, SEQUENCES = 512, 4
LENGTHS = {"cpu": (512, 1024, 2048), "cuda": (4096, 16384, 65536), "npu": (4096, 16384, 65536)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16, "npu": torch.bfloat16}
DEFAULT_SHAPE = {"cpu": "gqa-d64-g16", "cuda": "gqa-d128-g16", "npu": "gqa-d128-g16"}
OURS, DENSE = "ours", "dense"
ROUNDS = 11

Step = Callable[[], Any]


class DenseAttention(nn.Module):
    """What NativeSparseAttention replaces: causal attention to all tokens, with grouped queries."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.config = config
        groups = config.key_value_head_num
        self.query = nn.Linear(config.hidden_size, config.head_num * config.head_dim, bias=False)
        self.key = nn.Linear(config.hidden_size, groups * config.head_dim, bias=False)
        self.value = nn.Linear(config.hidden_size, groups * config.value_size, bias=False)
        self.output = nn.Linear(config.head_num * config.value_size, config.hidden_size, bias=False)
        self.keys = self.values = torch.empty(0)  # [B, N2, room, D]

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, hidden] to the same."""
        return self._attend(*self._project(hidden), causal=True)

    def fill(self, hidden: Tensor, room: int) -> None:
        """Cache the keys and values of a prompt, with room for more."""
        _, key, value = self._project(hidden)
        self.keys, self.values = (
            torch.cat((x, x.new_zeros((*x.shape[:2], room, x.shape[3]))), dim=2) for x in (key, value)
        )

    def decode(self, hidden: Tensor, place: int) -> Tensor:
        """One more token [B, 1, hidden] of each sequence."""
        query, key, value = self._project(hidden)
        self.keys[:, :, place : place + 1], self.values[:, :, place : place + 1] = key, value
        return self._attend(query, self.keys[:, :, : place + 1], self.values[:, :, : place + 1], causal=False)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (self.config.head_dim, self.config.head_dim, self.config.value_size)
        query, key, value = (
            project(hidden).view(*hidden.shape[:2], -1, size).transpose(1, 2)
            for project, size in zip((self.query, self.key, self.value), sizes, strict=True)
        )
        return query, key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        attended = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        mixed: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return mixed


def config_of(shape: Shape) -> NSAConfig:
    return NSAConfig(
        hidden_size=HIDDEN,
        head_num=shape.heads,
        key_value_head_num=shape.kv_heads,
        head_dim=shape.key_dim,
        value_dim=shape.value_dim,
        compress_block_size=shape.window,
        compress_stride=shape.stride,
        select_block_size=shape.block,
        select_block_count=shape.count,
        window_size=shape.local,
    )


@dataclass(frozen=True)
class Layers:
    """Both layers on one device, and inputs for them."""

    ours: NativeSparseAttention
    dense: DenseAttention

    @classmethod
    def of(cls, shape: Shape, session: Session) -> Layers:
        torch.manual_seed(0)
        config, dtype = config_of(shape), DTYPES[session.device.type]
        layers = (NativeSparseAttention(config, impl="triton"), DenseAttention(config))
        ours, dense = (layer.to(session.device, dtype) for layer in layers)
        return cls(ours, dense)  # type: ignore[arg-type]

    def tokens(self, batch: int, count: int) -> Tensor:
        weight = self.ours.key_weight
        return torch.randn(batch, count, HIDDEN, dtype=weight.dtype, device=weight.device)


def training_step(layer: nn.Module, hidden: Tensor) -> Step:
    def step() -> None:
        layer.zero_grad(set_to_none=True)
        layer(hidden).square().mean().backward()

    return step


class Decoding:
    """Both layers after the same prompt, one token after the other."""

    def __init__(self, layers: Layers, prompt: int, room: int) -> None:
        self.layers = layers
        self.hidden = layers.tokens(SEQUENCES, prompt + room)
        self.place = {OURS: prompt, DENSE: prompt}
        weight, most = layers.ours.key_weight, prompt + room
        self.cache = NSACache(
            layers.ours.config, layers=1, pages=SEQUENCES * (-(-most // (16 * layers.ours.config.compress_stride)) + 1),
            max_tokens=most, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        with torch.no_grad():
            self.numbers = [self.cache.add() for _ in range(SEQUENCES)]
            layers.ours(self.hidden[:, :prompt], step=self.cache.extend(dict.fromkeys(self.numbers, prompt)))
            layers.dense.fill(self.hidden[:, :prompt], room)
        self.step = self.cache.extend(dict.fromkeys(self.numbers, 1))
        for number in self.numbers:
            self.cache.truncate(number, prompt)

    @torch.no_grad()
    def ours(self) -> Tensor:
        token = self._next(OURS)
        step = self.cache.extend(dict.fromkeys(self.numbers, 1), into=self.step)
        decoded: Tensor = self.layers.ours(token, step=step)
        return decoded

    @torch.no_grad()
    def dense(self) -> Tensor:
        token = self._next(DENSE)
        return self.layers.dense.decode(token, self.place[DENSE] - 1)

    def _next(self, provider: str) -> Tensor:
        place = self.place[provider]
        self.place[provider] = place + 1
        return self.hidden[:, place : place + 1]

    def refuse_other_results(self) -> None:
        """Raise unless a decoded token is what one pass over the sequence gives it, but for blocks that rounding
        exchanges, in few rows."""
        place, allowed = self.place[OURS], 100 * torch.finfo(self.hidden.dtype).eps
        both = {OURS: (self.ours, self.layers.ours), DENSE: (self.dense, self.layers.dense)}
        for provider, (decode, layer) in both.items():
            found = decode()[:, 0].double()
            with torch.no_grad():
                expected = layer(self.hidden[:, : place + 1])[:, -1].double()
            error = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).median())
            if not error <= allowed:
                raise ArgumentValueError(provider, f"decoding to differ by {allowed:.1e} at most", f"{error:.1e}")


def timed(calls: dict[str, Step], session: Session, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns; each runs once before."""
    times: dict[str, list[float]] = {provider: [] for provider in calls}
    for number in range(rounds + 1):
        for provider, call in calls.items():
            us = session.clock.once(call)
            if number:
                times[provider].append(us / 1e3)
    return times


def measured(shape: Shape, tokens: int, session: Session, rounds: int) -> list[tuple[str, ...]]:
    """The rows of one length."""
    layers = Layers.of(shape, session)
    hidden = layers.tokens(1, tokens)
    training = {OURS: training_step(layers.ours, hidden), DENSE: training_step(layers.dense, hidden)}
    found = _rows("training step", 1, shape, tokens, session, timed(training, session, rounds))
    decoding = Decoding(layers, tokens, rounds + 2)
    decoding.refuse_other_results()
    decoded = timed({OURS: decoding.ours, DENSE: decoding.dense}, session, rounds)
    return found + _rows("decoding", SEQUENCES, shape, tokens, session, decoded)


def _rows(
    what: str, sequences: int, shape: Shape, tokens: int, session: Session, times: dict[str, list[float]]
) -> list[tuple[str, ...]]:
    machine, dense = session.machine, percentile(times[DENSE], 50)
    dtype = str(DTYPES[session.device.type]).removeprefix("torch.")
    return [
        (
            what, provider, shape.name, str(tokens), str(sequences), dtype,
            *(f"{percentile(own, percent):.3f}" for percent in (20, 50, 80)),
            str(len(own)), f"{dense / percentile(own, 50):.2f}",
            *(machine[name] for name in ("target", "device", "torch", "triton", "nsa_triton", "commit")),
        )
        for provider, own in times.items()
    ]  # fmt: skip


def run(
    device: torch.device, shapes: Sequence[str], lengths: Sequence[int], folder: Path, rounds: int = ROUNDS
) -> Path:
    """Time both layers, print a line for each, and write all that is there after every length."""
    session = Session(device, 0.0)
    file = folder / session.target / "end_to_end.csv"
    rows: list[tuple[str, ...]] = []
    models = [shape_named(name) for name in shapes or [DEFAULT_SHAPE[device.type]]]
    for shape, tokens in product(models, lengths or LENGTHS[device.type]):
        for row in measured(shape, tokens, session, rounds):
            what, provider, model, length, *_ = row
            print(
                f"{what:13} {provider:5} {model} {length:>6} tokens  {row[7]:>9} ms  {row[10]:>5} × dense", flush=True
            )
            rows.append(row)
        write_table(file, [COLUMNS, *rows])
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = present_targets()
    parser.add_argument("--target", choices=here, default=here[0], help="default: %(default)s")
    parser.add_argument("--shape", nargs="+", default=(), metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--lengths", nargs="+", type=int, default=(), metavar="T", help="default: what fits the device")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args()
    device = torch.device(options.target)
    print(f"wrote {run(device, options.shape, options.lengths, options.output, options.rounds)}", file=sys.stderr)


if __name__ == "__main__":
    main()
