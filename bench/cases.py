"""Each benchmark case, declared once: an operator, the model's shape, lengths, distribution of ids, providers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from nsa_triton.errors import ArgumentValueError
from nsa_triton.workloads import INDICES, OPS, SHAPES

DTYPE = torch.bfloat16
DEFAULT = ("ours", "reference", "sdpa", "torch_npu", "roofline")  # simulated: only where it is asked for, it takes long
PROVIDERS = (*DEFAULT, "simulated")
LONGEST = 1 << 20  # tokens; more is a slip of the finger


@dataclass(frozen=True)
class Case:
    """`lengths` are tokens of each sequence, on an accelerator and on a CPU. One of several `indices` is a row each."""

    op: str
    lengths: tuple[int, ...]
    cpu_lengths: tuple[int, ...]
    providers: tuple[str, ...]
    shape: str = "paper"
    indices: tuple[str, ...] = ("scores",)
    batch: int | None = None


@dataclass(frozen=True)
class Point:
    """What is timed side by side: all of these providers on the same inputs."""

    op: str
    shape: str
    tokens: int
    batch: int | None
    indices: str
    providers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.tokens} tokens, {self.indices}"


COMPRESSION = tuple(name for name in PROVIDERS if name != "sdpa")  # dense attention compresses nothing
TRAINING, DECODING = (1024, 4096, 8192, 16384, 32768, 65536), (4096, 16384, 32768, 65536)
CPU_TRAINING, CPU_DECODING = (256, 512, 1024), (1024, 4096, 16384)

CASES = (
    Case("nsa_compress", TRAINING, (1024, 4096, 16384), COMPRESSION),
    Case("nsa_compress_grad", TRAINING, (1024, 4096, 16384), COMPRESSION),
    Case("nsa_compress_attention", TRAINING, CPU_TRAINING, PROVIDERS),
    Case("nsa_compress_attention_grad", TRAINING, CPU_TRAINING, PROVIDERS),
    Case("nsa_select_attention", TRAINING, CPU_TRAINING, PROVIDERS),
    Case("nsa_select_attention_grad", TRAINING, CPU_TRAINING, PROVIDERS),
    Case("nsa_gated_combine", TRAINING, (1024, 4096, 16384), COMPRESSION),
    Case("nsa_gated_combine_grad", TRAINING, (1024, 4096, 16384), COMPRESSION),
    Case("nsa_sliding_window_attention", TRAINING, CPU_TRAINING, PROVIDERS),
    Case("nsa_sliding_window_attention_grad", TRAINING, CPU_TRAINING, PROVIDERS),
    Case("nsa_compress_infer", DECODING, CPU_DECODING, COMPRESSION),
    Case("nsa_compress_attention_infer", DECODING, CPU_DECODING, PROVIDERS),
    Case("nsa_select_attention_infer", DECODING, CPU_DECODING, PROVIDERS),
    Case("nsa_sliding_window_attention_infer", DECODING, CPU_DECODING, PROVIDERS),
)


@dataclass(frozen=True)
class Wanted:
    """What the user asked for; None or empty: what the cases say."""

    ops: Sequence[str] = ()
    shapes: Sequence[str] = ()
    lengths: Sequence[int] = ()
    providers: Sequence[str] = ()
    indices: Sequence[str] = ()
    quick: bool = False

    def check(self) -> None:
        for argument, given, valid in (
            ("op", self.ops, OPS),
            ("--shape", self.shapes, tuple(SHAPES)),
            ("--providers", self.providers, PROVIDERS),
            ("--indices", self.indices, INDICES),
        ):
            for value in given:
                if value not in valid:
                    raise ArgumentValueError(argument, f"one of {', '.join(valid)}", repr(value))
        for tokens in self.lengths:
            if not 32 <= tokens <= LONGEST:
                raise ArgumentValueError("--lengths", f"integers from 32 to {LONGEST}", tokens)


def points(wanted: Wanted, *, on_cpu: bool) -> Iterator[Point]:
    """All points, in the order of the cases."""
    wanted.check()
    chosen = [case for case in CASES if not wanted.ops or case.op in wanted.ops]
    for case in [_quick(case) if wanted.quick else case for case in chosen]:
        lengths = wanted.lengths or (case.cpu_lengths if on_cpu else case.lengths)
        providers = tuple(name for name in wanted.providers or DEFAULT if name in case.providers)
        indices = (wanted.indices or case.indices) if "select" in case.op else ("scores",)
        for shape in wanted.shapes or (case.shape,):
            for distribution in indices:
                for tokens in lengths:
                    yield Point(case.op, shape, tokens, case.batch, distribution, providers)


def _quick(case: Case) -> Case:
    decodes = case.op.endswith("_infer")
    lengths = (1024,) if decodes else (128,)
    return replace(case, shape="gqa-d64-g4", lengths=lengths, cpu_lengths=lengths, batch=4 if decodes else None)
