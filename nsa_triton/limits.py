"""What each operator accepts: one table of limits, and the checks that read it.

Every row has two columns. The *structural* one always holds. The *documented* one is what CANN's documents say; it is
in force too inside `limits("documented")`, or with NSA_TRITON_LIMITS=documented, for users who want to know whether a
model would still run on CANN. To add an operator, add its rows; printed tables are made from `LIMITS` too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from nsa_triton.errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from nsa_triton.settings import settings

MODES = ("structural", "documented")

Bound = int | str  # a number, or the name of another quantity of the same call
Quantities = Mapping[str, Any]


@dataclass(frozen=True)
class Range:
    """An integer from `minimum` to `maximum` (None: no end), both included, that is divisible by `multiple_of`."""

    minimum: Bound
    maximum: Bound | None = None
    multiple_of: Bound = 1
    error: ClassVar[type[ArgumentError]] = ArgumentValueError

    def accepts(self, value: Any, given: Quantities) -> bool:
        low, step = _value(self.minimum, given), _value(self.multiple_of, given)
        below = self.maximum is None or value <= _value(self.maximum, given)
        return bool(low <= value and below and value % step == 0)

    def text(self, given: Quantities | None = None) -> str:
        low, step = _text(self.minimum, given), _text(self.multiple_of, given)
        kind = "an integer" if step == "1" else f"a multiple of {step}"
        if self.maximum is None:
            return f"{kind}, at least {low}"
        return f"{kind} from {low} to {_text(self.maximum, given)}"


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
class OneOf:
    """One of a few numbers."""

    choices: tuple[int, ...]
    error: ClassVar[type[ArgumentError]] = ArgumentValueError

    def accepts(self, value: Any, given: Quantities) -> bool:
        return value in self.choices

    def text(self, given: Quantities | None = None) -> str:
        return _listed(map(str, self.choices))


@dataclass(frozen=True)
class Dtype:
    """One of a few element types."""

    choices: tuple[torch.dtype, ...]
    error: ClassVar[type[ArgumentError]] = ArgumentTypeError

    def accepts(self, value: Any, given: Quantities) -> bool:
        return value in self.choices

    def text(self, given: Quantities | None = None) -> str:
        return _listed(str(dtype).removeprefix("torch.") for dtype in self.choices)


def _listed(choices: Iterable[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}"


Rule = Range | Equal | OneOf | Dtype


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
        rules = [(self.structural, ""), (self.documented, " (documented limit of CANN)")]
        for rule, source in rules if mode == "documented" else rules[:1]:
            if not rule.accepts(given[self.quantity], given):
                raise rule.error(self.argument, rule.text(given) + source, given[self.quantity], self.hint)


def _value(bound: Bound, given: Quantities) -> Any:
    return given[bound] if isinstance(bound, str) else bound


def _text(bound: Bound, given: Quantities | None) -> str:
    return f"{bound} = {given[bound]}" if isinstance(bound, str) and given is not None else str(bound)


def _same(op: str, quantity: str, argument: str, rule: Rule, hint: str = "") -> Limit:
    return Limit(op, quantity, argument, structural=rule, documented=rule, hint=hint)


_DTYPE = Dtype((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_HALF = Dtype((torch.float16, torch.bfloat16))

# In the order in which they are checked. The rows of nsa_compress also hold for its gradient.
_COMPRESS: tuple[Limit, ...] = (
    Limit("nsa_compress", "dtype", "input.dtype", _DTYPE, _HALF, "Convert input and weight with .to(dtype)"),
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


def _compress_infer() -> Iterator[Limit]:
    op = "nsa_compress_infer"
    yield Limit(op, "dtype", "input.dtype", _DTYPE, _HALF, "Convert input, weight and cache with .to(dtype)")
    window = Range(16, 128, multiple_of=16)
    yield Limit(op, "compress_block_size", "compress_block_size", window, Range(16, 64, multiple_of=16))
    yield _same(op, "compress_stride", "compress_stride", Range(16, "compress_block_size", multiple_of=16))
    yield Limit(op, "page_block_size", "page_block_size", Range(16, multiple_of=16), OneOf((64, 128)))
    yield Limit(op, "B", "len(actual_seq_len) (B)", Range(1), Range(1, 2048))
    yield Limit(op, "N", "input heads (N)", Range(1), Range(1, 64))
    yield Limit(op, "D", "input head size (D)", Range(1), Range(16, 256, multiple_of=16))
    yield Limit(op, "new_tokens", "new_tokens", Range(1), Equal(1), "CANN sees the newest token only")
    yield _same(op, "weight.shape[0]", "weight.shape[0]", Equal("compress_block_size"))
    yield _same(op, "weight.shape[1]", "weight.shape[1]", Equal("N"), "weight is [compress_block_size, N]")
    yield _same(op, "cache.shape[1]", "cache.shape[1]", Equal("N"), "cache is [rows, N, D]")
    yield _same(op, "cache.shape[2]", "cache.shape[2]", Equal("D"), "cache is [rows, N, D]")


def _attention_heads(op: str, max_group: int) -> Iterator[Limit]:
    """What both attention operators ask of heads."""
    hint = "head_num and key_value_head_num say how the last dimensions are cut into heads"
    yield _same(op, "N1", "head_num", Equal("query heads"), hint)
    yield _same(op, "N2", "key_value_head_num", Equal("key heads"), hint)
    yield _same(op, "value heads", "value heads", Equal("N2"), hint)
    yield _same(op, "head_num", "head_num", Range("N2", multiple_of="N2"), "Each kv head serves equally many heads")
    yield Limit(op, "G", "head_num / key_value_head_num (G)", Range(1), Range(1, max_group))
    yield _same(op, "key head size", "key head size", Equal("Dk"), "Queries and keys are multiplied")


def _compress_attention_infer() -> Iterator[Limit]:
    op = "nsa_compress_attention_infer"
    sixteens, sizes = Range(16, multiple_of=16), OneOf((16, 32, 64))
    blocks = Range("compress_block_size", multiple_of="compress_stride")
    yield Limit(op, "dtype", "query.dtype", _DTYPE, _HALF, "Convert query, key and value with .to(dtype)")
    yield Limit(op, "compress_block_size", "compress_block_size", sixteens, sizes)
    strides = Range(16, "compress_block_size", multiple_of=16)
    yield Limit(op, "compress_stride", "compress_stride", strides, sizes)
    yield Limit(op, "select_block_size", "select_block_size", blocks, sizes, "Blocks are made of whole strides")
    yield Limit(op, "select_block_count", "select_block_count", Range(1), Range(1, 4096))
    yield Limit(op, "page_block_size", "page_block_size", sixteens, Range(16, 128, multiple_of=16))
    yield from _attention_heads(op, 128)
    yield Limit(op, "128 % G", "128 % G", Range(0), Equal(0), "CANN takes groups that divide 128")
    yield Limit(op, "Dk", "query head size (Dk)", Range(1), Range(1, 192))
    yield Limit(op, "Dv", "value head size (Dv)", Range(1), Range(1, 128))
    yield Limit(op, "S", "query tokens per batch (S)", Range(1), Equal(1))


def _select_attention_infer() -> Iterator[Limit]:
    op = "nsa_select_attention_infer"
    sixteens = Range(16, multiple_of=16)
    yield Limit(op, "dtype", "query.dtype", _DTYPE, _HALF, "Convert query, key and value with .to(dtype)")
    yield Limit(op, "select_block_size", "select_block_size", sixteens, Range(16, 128, multiple_of=16))
    yield _same(op, "select_block_count", "select_block_count", Equal("topk_indices.shape[-1]"))
    yield Limit(op, "page_block_size", "page_block_size", sixteens, OneOf((64, 128)))
    yield from _attention_heads(op, 16)
    yield Limit(op, "B", "batches (B)", Range(1), Range(1, 3072))
    yield Limit(op, "key_value_head_num", "key_value_head_num", Range(1), Range(1, 256))
    yield Limit(op, "Dk", "query head size (Dk)", Range(1), Equal(192))
    yield Limit(op, "Dv", "value head size (Dv)", Range(1), Equal(128))
    yield Limit(op, "S", "query tokens per batch (S)", Range(1), Range(1, 4))


def _packed_attention(op: str, keys: str, max_group: int, max_batch: int) -> Iterator[Limit]:
    """What the training attention operators ask of heads and of prefix sums; `keys` names the list of the keys."""
    prefix = "The list holds prefix sums (s0, s0 + s1, ...), not the length of each segment"
    yield _same(op, "N1", "head_num", Equal("query heads"), "It is query.shape[1]")
    yield _same(op, "value heads", "value.shape[1]", Equal("N2"), "Keys and values have the same heads")
    yield _same(op, "head_num", "head_num", Range(0, multiple_of="N2"), "Each kv head serves equally many heads")
    yield Limit(op, "G", "head_num / key.shape[1] (G)", Range(0), Range(1, max_group))
    yield _same(op, "key head size", "key.shape[2]", Equal("Dk"), "Queries and keys are multiplied")
    yield Limit(op, "B", "len(actual_seq_qlen) (B)", Range(1), Range(1, max_batch))
    yield _same(op, "actual_seq_qlen[-1]", "actual_seq_qlen[-1]", Range(0, "T1"), f"{prefix}; T1 is query.shape[0]")
    yield _same(op, f"{keys}[-1]", f"{keys}[-1]", Range(0, "T2"), f"{prefix}; T2 is key.shape[0]")


def _compress_attention() -> Iterator[Limit]:
    """They also hold for the gradient."""
    op = "nsa_compress_attention"
    sixteens = Range(16, multiple_of=16)
    to_128, to_64 = Range(16, 128, multiple_of=16), Range(16, 64, multiple_of=16)
    blocks = Range("compress_block_size", multiple_of="compress_stride")
    yield Limit(op, "dtype", "query.dtype", _DTYPE, _HALF, "Convert query, key and value with .to(dtype)")
    yield Limit(op, "compress_block_size", "compress_block_size", sixteens, to_128)
    yield Limit(op, "compress_stride", "compress_stride", Range(16, "compress_block_size", multiple_of=16), to_64)
    yield Limit(op, "select_block_size", "select_block_size", blocks, to_128, "Blocks are made of whole strides")
    yield Limit(op, "select_block_count", "select_block_count", Range(1), Range(1, 32))
    yield Limit(op, "fewest blocks", "fewest blocks of a segment", Range(0), Range("select_block_count"))
    yield _same(op, "num_init_blocks", "num_init_blocks", Range(0))
    yield _same(op, "num_local_blocks", "num_local_blocks", Range(0))
    yield _same(op, "query heads", "query.shape[1] (N1)", Range(1))
    yield from _packed_attention(op, "actual_cmp_seq_kvlen", max_group=127, max_batch=4096)
    yield Limit(op, "128 % G", "128 % G", Range(0), Equal(0), "CANN takes groups that divide 128")
    yield Limit(op, "Dk", "query.shape[2] (Dk)", Range(1), Range(1, 768))
    yield Limit(op, "Dv", "value.shape[2] (Dv)", Range(1), Range(1, "Dk"))
    yield Limit(op, "S2", "longest segment of keys", Range(0), Range(0, 14000))


def _select_attention() -> Iterator[Limit]:
    """They also hold for the gradient."""
    op = "nsa_select_attention"
    yield Limit(op, "dtype", "query.dtype", _DTYPE, _HALF, "Convert query, key and value with .to(dtype)")
    blocks = Range(16, multiple_of=16)
    yield Limit(op, "select_block_size", "select_block_size", blocks, Range(16, 128, multiple_of=16))
    yield _same(op, "select_block_count", "select_block_count", Equal("topk_indices.shape[2]"))
    yield Limit(op, "topk_indices.shape[2]", "topk_indices.shape[2] (K)", Range(1), Range(1, 32))
    yield _same(op, "T2", "key.shape[0] (T2)", Range(1))
    yield from _packed_attention(op, "actual_seq_kvlen", max_group=32, max_batch=1024)
    yield Limit(op, "query heads", "query.shape[1] (N1)", Range(0), Range(1, 128))
    yield Limit(op, "Dk", "query.shape[2] (Dk)", Range(1), Equal(192))
    yield Limit(op, "Dv", "value.shape[2] (Dv)", Range(1), Equal(128))
    yield Limit(op, "S1", "longest segment of queries", Range(0), Range(1, 131072))
    yield Limit(op, "S2", "longest segment of keys", Range(0), Range(1, 131072))
    yield Limit(op, "least S2", "shortest segment of keys", Range(0), Range("K * select_block_size"))
    remainder = "largest remainder of a segment of keys by select_block_size"
    yield Limit(op, "S2 % select_block_size", remainder, Range(0), Equal(0), "CANN takes whole blocks")


def _gated_combine() -> Iterator[Limit]:
    """They also hold for the gradient. CANN has no such operator: there is nothing else to document."""
    op = "nsa_gated_combine"
    yield _same(op, "dtype", "compressed.dtype", _DTYPE, "Convert the branches with .to(dtype)")
    yield _same(op, "N1", "compressed.shape[-2] (N1)", Range(1))
    yield _same(op, "Dv", "compressed.shape[-1] (Dv)", Range(1))


def _sliding_window_attention() -> Iterator[Limit]:
    """They also hold for the gradient. CANN has no such operator: there is nothing else to document."""
    op = "nsa_sliding_window_attention"
    yield _same(op, "dtype", "query.dtype", _DTYPE, "Convert query, key and value with .to(dtype)")
    yield _same(op, "window_size", "window_size", Range(1))
    yield _same(op, "query heads", "query.shape[1] (N1)", Range(1))
    for limit in _packed_attention(op, "actual_seq_kvlen", max_group=1, max_batch=1):
        yield replace(limit, documented=limit.structural)
    yield _same(op, "Dk", "query.shape[2] (Dk)", Range(1))
    yield _same(op, "Dv", "value.shape[2] (Dv)", Range(1))


def _sliding_window_attention_infer() -> Iterator[Limit]:
    """CANN has no such operator: there is nothing else to document."""
    op = "nsa_sliding_window_attention_infer"
    yield _same(op, "dtype", "query.dtype", _DTYPE, "Convert query, key and value with .to(dtype)")
    yield _same(op, "window_size", "window_size", Range(1))
    yield _same(op, "page_block_size", "page_block_size", Range(16, multiple_of=16))
    for limit in _attention_heads(op, max_group=1):
        yield replace(limit, documented=limit.structural)
    yield _same(op, "B", "batches (B)", Range(1))
    yield _same(op, "key_value_head_num", "key_value_head_num", Range(1))
    yield _same(op, "Dk", "query head size (Dk)", Range(1))
    yield _same(op, "Dv", "value head size (Dv)", Range(1))
    yield _same(op, "S", "query tokens per batch (S)", Range(1))


LIMITS: tuple[Limit, ...] = (
    *_COMPRESS,
    *_compress_infer(),
    *_compress_attention_infer(),
    *_select_attention_infer(),
    *_select_attention(),
    *_compress_attention(),
    *_sliding_window_attention(),
    *_sliding_window_attention_infer(),
    *_gated_combine(),
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
