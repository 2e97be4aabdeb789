"""What each operator accepts: one table of limits, and the checks that read it.

Every row has two columns. The *structural* one always holds. The *documented* one is what CANN's documents say; it is
in force inside `limits("documented")`, or with NSA_TRITON_LIMITS=documented, for users who want to know whether a
model would still run on CANN. To add an operator, add its rows; printed tables are made from `LIMITS` too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from nsa_triton.errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from nsa_triton.settings import settings

MODES = ("structural", "documented")

Bound = int | str  # a number, or the name of another quantity of the same call
Quantities = Mapping[str, Any]


@dataclass(frozen=True)
class Range:
    """An integer from `minimum` to `maximum`, both included, that is divisible by `multiple_of`."""

    minimum: Bound
    maximum: Bound
    multiple_of: Bound = 1
    error: ClassVar[type[ArgumentError]] = ArgumentValueError

    def accepts(self, value: Any, given: Quantities) -> bool:
        low, high, step = (_value(bound, given) for bound in (self.minimum, self.maximum, self.multiple_of))
        return bool(low <= value <= high and value % step == 0)

    def text(self, given: Quantities | None = None) -> str:
        low, high, step = (_text(bound, given) for bound in (self.minimum, self.maximum, self.multiple_of))
        return f"{'an integer' if step == '1' else f'a multiple of {step}'} from {low} to {high}"


@dataclass(frozen=True)
class Equal:
    """The same number as another quantity of the call."""

    other: Bound
    error: ClassVar[type[ArgumentError]] = ArgumentValueError

    def accepts(self, value: Any, given: Quantities) -> bool:
        return bool(value == _value(self.other, given))

    def text(self, given: Quantities | None = None) -> str:
        return f"equal to {_text(self.other, given)}"


@dataclass(frozen=True)
class Dtype:
    """One of a few element types."""

    choices: tuple[torch.dtype, ...]
    error: ClassVar[type[ArgumentError]] = ArgumentTypeError

    def accepts(self, value: Any, given: Quantities) -> bool:
        return value in self.choices

    def text(self, given: Quantities | None = None) -> str:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in self.choices)
        return f"{', '.join(others)} or {last}"


Rule = Range | Equal | Dtype


@dataclass(frozen=True)
class Limit:
    """One row of the table: `quantity` is its name in other rows and in `check`, `argument` its name in messages."""

    op: str
    quantity: str
    argument: str
    structural: Rule
    documented: Rule
    hint: str = ""

    def check(self, given: Quantities, mode: str) -> None:
        rule = self.documented if mode == "documented" else self.structural
        if not rule.accepts(given[self.quantity], given):
            source = " (documented limit of CANN)" if mode == "documented" else ""
            raise rule.error(self.argument, rule.text(given) + source, given[self.quantity], self.hint)


def _value(bound: Bound, given: Quantities) -> Any:
    return given[bound] if isinstance(bound, str) else bound


def _text(bound: Bound, given: Quantities | None) -> str:
    return f"{bound} = {given[bound]}" if isinstance(bound, str) and given is not None else str(bound)


def _same(op: str, quantity: str, argument: str, rule: Rule, hint: str = "") -> Limit:
    return Limit(op, quantity, argument, structural=rule, documented=rule, hint=hint)


# In the order in which they are checked. The rows of nsa_compress also hold for its gradient.
LIMITS: tuple[Limit, ...] = (
    Limit(
        "nsa_compress",
        "dtype",
        "input.dtype",
        structural=Dtype((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
        documented=Dtype((torch.float16, torch.bfloat16)),
        hint="Convert input and weight with .to(dtype)",
    ),
    _same("nsa_compress", "compress_block_size", "compress_block_size", Range(16, 128, multiple_of=16)),
    _same("nsa_compress", "compress_stride", "compress_stride", Range(16, "compress_block_size", multiple_of=16)),
    _same("nsa_compress", "N", "input.shape[1] (N)", Range(1, 128), "Split the heads over several calls"),
    _same(
        "nsa_compress",
        "D",
        "input.shape[2] (D)",
        Range(16, 256, multiple_of=16),
        "Pad the last dimension with zeros and cut the output, or split it over several calls",
    ),
    _same("nsa_compress", "weight.shape[0]", "weight.shape[0]", Equal("compress_block_size")),
    _same("nsa_compress", "weight.shape[1]", "weight.shape[1]", Equal("N"), "weight is [compress_block_size, N]"),
    _same(
        "nsa_compress",
        "actual_seq_len[-1]",
        "actual_seq_len[-1]",
        Equal("T"),
        "The list holds prefix sums (s0, s0 + s1, ...), not the length of each segment; T is input.shape[0]",
    ),
)


@functools.cache
def rows(op: str) -> tuple[Limit, ...]:
    """The limits of one operator, in the order in which they are checked."""
    return tuple(limit for limit in LIMITS if limit.op == op)


def check(op: str, given: Quantities, mode: str) -> None:
    """Raise for the first row of `op` that a call breaks; only rows of given quantities are looked at."""
    for limit in rows(op):
        if limit.quantity in given:
            limit.check(given, mode)


_chosen: ContextVar[str | None] = ContextVar("nsa_triton_limits", default=None)


def mode_in_force() -> str:
    """The column that public calls are checked against here and now: "structural" or "documented"."""
    return _chosen.get() or settings().limits


@contextlib.contextmanager
def limits(mode: str) -> Iterator[None]:
    """Enforce one column of the table inside a `with` block, whatever NSA_TRITON_LIMITS says.

    Example:
        >>> with nsa_triton.limits("documented"):  # also refuse what CANN's documents refuse
        ...     loss = model(batch)
    """
    if mode not in MODES:
        raise ArgumentValueError("mode", f"one of {', '.join(MODES)}", repr(mode))
    token = _chosen.set(mode)
    try:
        yield
    finally:
        _chosen.reset(token)
