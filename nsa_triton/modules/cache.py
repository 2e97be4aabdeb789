"""The keys and values of sequences that grow: raw and compressed, in pages.

cache = NSACache(config, layers=24, pages=4096, max_tokens=65536, dtype=torch.bfloat16, device="npu")
sequence = cache.add()
step = cache.extend({sequence: 700})          # room for 700 new tokens, in all layers
for number, layer in enumerate(layers):
    ... layer.attention(hidden, step=step, layer=number)
step = cache.extend({sequence: 1})            # the next token

A page holds `page_size` tokens and the compressed tokens whose windows begin in it, so that one table serves both. What
is decided per step is decided on the host, from lengths that it knows, and goes to the device in one copy; nothing is
read back. A sequence may be forked: both share pages until one of them writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_triton.errors import ArgumentValueError, CacheFullError
from nsa_triton.modules.config import NSAConfig
from nsa_triton.modules.pages import Growth, PagePool, Sequence
from nsa_triton.ops._common.arguments import check_int
from nsa_triton.ops.compress_infer import nsa_compress_infer


@dataclass(frozen=True)
class Row:
    """Some new tokens of a sequence, no more than a stride: the tokens before `begin` are in the cache already."""

    sequence: Sequence
    begin: int
    end: int


class Step:
    """New tokens of some sequences: where they go, and what they see. Made by `NSACache.extend`.

    The tokens are packed, sequence after sequence. They are worked on in rows of at most `compress_stride` tokens,
    because that many complete one window at most; each row has its own line in the tables, [rows] or [rows, columns].

    Attributes:
        cache: the cache that the tokens go to.
        tokens: how many there are.
        most: the most tokens of a row.
        fresh: where the tokens of each sequence begin and end, as `cu_seqlens`, if all sequences were empty before.
    """

    def __init__(self, cache: NSACache, rows: list[Row], fresh: list[int] | None) -> None:
        self.cache, self.fresh = cache, fresh
        self._layout = _layout(rows)
        _, self.tokens, self.most = self._layout
        shapes = {
            "table": (len(rows), cache.columns), "lengths": (len(rows),), "windows": (len(rows),),
            "counts": (len(rows),), "window_slots": (len(rows),), "slots": (self.tokens,), "positions": (self.tokens,),
        }  # fmt: skip
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._buffer = torch.empty(sum(sizes), dtype=torch.int32, device=cache.device)
        parts = torch.split(self._buffer, sizes)
        self._fields: dict[str, Tensor] = {
            name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)
        }
        self._places = torch.empty((2, self.tokens), dtype=torch.int64, device=cache.device)
        self._fill(rows)

    def check(self, rows: list[Row]) -> None:
        """Raise unless these rows are laid out as those that the step was made for."""
        if _layout(rows) != self._layout:
            expected, got = (f"{n} rows with {tokens} tokens, {most} at most" for n, tokens, most in
                             (self._layout, _layout(rows)))  # fmt: skip
            raise ArgumentValueError("into", f"a step with {got}, as these tokens need", f"one with {expected}")

    def refill(self, rows: list[Row], fresh: list[int] | None) -> None:
        """Take other tokens, laid out alike, into the same tensors."""
        self.fresh = fresh
        self._fill(rows)

    def _fill(self, rows: list[Row]) -> None:
        self._buffer.copy_(torch.from_numpy(self.cache.tables(rows)))
        # Of 64 bits, as indexing and embeddings want them: once per step instead of once per layer.
        for place, name in zip(self._places, ("slots", "positions"), strict=True):
            place.copy_(self._fields[name])

    @property
    def table(self) -> Tensor:
        """[rows, columns] the pages of the sequence of each row, -1 behind them."""
        return self._fields["table"]

    @property
    def lengths(self) -> Tensor:
        """[rows] tokens of the sequence up to the end of the row."""
        return self._fields["lengths"]

    @property
    def windows(self) -> Tensor:
        """[rows] compressed tokens up to the end of the row."""
        return self._fields["windows"]

    @property
    def counts(self) -> Tensor | None:
        """[rows] new tokens of each row; None where all have one."""
        return None if self._layout[0] == self.tokens else self._fields["counts"]

    @property
    def window_slots(self) -> Tensor:
        """[rows] where the window goes that a row completes, -1 where it completes none."""
        return self._fields["window_slots"]

    @property
    def slots(self) -> Tensor:
        """[tokens] where each new token goes."""
        return self._places[0]

    @property
    def positions(self) -> Tensor:
        """[tokens] the place of each new token in its sequence: what rotary embeddings want."""
        return self._places[1]


class NSACache:
    """Keys and values of all layers of a model, of as many sequences as fit.

    Args:
        config: heads, windows and blocks; those of the module that uses the cache.
        layers: layers of the model.
        pages: pages of each layer. Room for `pages * page_size` tokens.
        max_tokens: no sequence may have more. Scratch memory of a step grows with it.
        page_size: tokens per page, a multiple of 16 * compress_stride. None: 16 * compress_stride.
        dtype: of keys and values.
        device: where they are.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument is not as above.
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        layers: int,
        pages: int,
        max_tokens: int,
        page_size: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        stride = config.compress_stride
        page_size = 16 * stride if page_size is None else page_size
        for name, number in {
            "layers": layers,
            "pages": pages,
            "max_tokens": max_tokens,
            "page_size": page_size,
        }.items():
            _check_count(name, number)
        if page_size % (16 * stride):
            expected = f"a multiple of {16 * stride}, 16 compressed tokens"
            raise ArgumentValueError("page_size", expected, page_size)
        self.config, self.layers, self.max_tokens, self.page_size = config, layers, max_tokens, page_size
        self.compressed_page_size = page_size // stride
        self.columns = -(-max_tokens // page_size)
        self.device = torch.device(device)

        def new(tokens: int, heads: int) -> Iterator[Tensor]:
            for size in (config.head_dim, config.value_size):
                yield torch.zeros((layers, pages, tokens, heads, size), dtype=dtype, device=self.device)

        self.keys, self.values = new(page_size, config.raw_head_num)
        self.compressed_keys, self.compressed_values = new(self.compressed_page_size, config.key_value_head_num)
        self._pool = PagePool(pages, page_size)
        self._sequences: dict[int, Sequence] = {}
        self._next = 0

    # ---- sequences ----

    def add(self) -> int:
        """A new, empty sequence; the number that stands for it."""
        return self._register(Sequence())

    def fork(self, sequence: int) -> int:
        """Another sequence with the tokens of this one. Pages are shared until one of the two writes to them."""
        return self._register(self._pool.fork(self._of(sequence)))

    def truncate(self, sequence: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of a sequence: what speculative decoding did not accept."""
        of_sequence = self._of(sequence)
        if type(tokens) is not int or not 0 <= tokens <= of_sequence.tokens:
            raise ArgumentValueError("tokens", f"an int from 0 to {of_sequence.tokens}, its length", tokens)
        self._pool.shrink(of_sequence, tokens)

    def free(self, sequence: int) -> None:
        """Forget a sequence; its pages are used again."""
        self._pool.shrink(self._of(sequence), 0)
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._of(sequence).tokens

    @property
    def sequences(self) -> tuple[int, ...]:
        """All sequences that there are."""
        return tuple(self._sequences)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence uses."""
        return self._pool.available

    def _register(self, sequence: Sequence) -> int:
        number, self._next = self._next, self._next + 1
        self._sequences[number] = sequence
        return number

    def _of(self, sequence: int) -> Sequence:
        if sequence not in self._sequences:
            known = ", ".join(map(str, self._sequences)) or "none"
            raise ArgumentValueError("sequence", f"one of those in the cache ({known})", sequence, "Call add() first")
        return self._sequences[sequence]

    # ---- growth ----

    def extend(self, tokens: Mapping[int, int], *, into: Step | None = None) -> Step:
        """Make room for new tokens, which the modules of all layers write then.

        Args:
            tokens: how many new tokens each sequence gets, at least 1. The tokens of a step are packed in this order.
            into: a step for as many tokens of as many sequences, whose tensors are filled again, in place: a captured
                graph goes on with them.

        Raises:
            CacheFullError: too few pages are free. Nothing was changed.
            ArgumentValueError: a sequence is unknown, gets no token, or would be longer than `max_tokens`.
        """
        growths = [self._growth(sequence, count) for sequence, count in tokens.items()]
        if not growths:
            raise ArgumentValueError("tokens", "new tokens of one sequence at least", "{}")
        needed = self._pool.needed(growths)
        if needed > self._pool.available:
            problem = f"{needed} pages of {self.page_size} tokens are needed, {self._pool.available} are free"
            raise CacheFullError(f"{problem} of {self._pool.count}. Free sequences, or make the cache with more pages")
        rows = [row for growth in growths for row in self._rows(growth)]
        if into is not None:
            into.check(rows)
        are_new = not any(growth.sequence.tokens for growth in growths)
        fresh = [0, *accumulate(tokens.values())] if are_new else None
        self._copy([pair for growth in growths for pair in self._pool.grow(growth)])
        if into is None:
            return Step(self, rows, fresh)
        into.refill(rows, fresh)
        return into

    def _growth(self, sequence: int, count: int) -> Growth:
        of_sequence = self._of(sequence)
        _check_count(f"tokens[{sequence}]", count)
        before, after = of_sequence.tokens, of_sequence.tokens + count
        if after > self.max_tokens:
            expected = f"at most {self.max_tokens - before}: the sequence has {before} tokens, max_tokens is"
            raise ArgumentValueError(f"tokens[{sequence}]", f"{expected} {self.max_tokens}", count)
        first = before
        if self.config.windows(after) > self.config.windows(before):  # the first new window may begin pages before
            first = min(first, self.config.windows(before) * self.config.compress_stride)
        return Growth(of_sequence, after, first // self.page_size)

    def _rows(self, growth: Growth) -> list[Row]:
        stride, sequence = self.config.compress_stride, growth.sequence
        begins = range(sequence.tokens, growth.after, stride)
        return [Row(sequence, begin, min(begin + stride, growth.after)) for begin in begins]

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            shared, own = (torch.tensor(pages, device=self.device) for pages in zip(*pairs, strict=True))
            for cache in (self.keys, self.values, self.compressed_keys, self.compressed_values):
                cache[:, own] = cache[:, shared]

    def tables(self, rows: list[Row]) -> np.ndarray[Any, Any]:
        """The tensors of a step, one after another: see there."""
        table = np.full((len(rows), self.columns), -1, dtype=np.int32)
        windows, window_slots, slots = [], [], []
        for number, row in enumerate(rows):
            pages = np.asarray(row.sequence.pages, dtype=np.int32)
            table[number, : len(pages)] = pages
            at = np.arange(row.begin, row.end)
            slots.append(pages[at // self.page_size] * self.page_size + at % self.page_size)
            windows.append(self.config.windows(row.end))
            completes = windows[-1] > self.config.windows(row.begin)
            page, place = divmod(windows[-1] - 1, self.compressed_page_size)
            window_slots.append(int(pages[page]) * self.compressed_page_size + place if completes else -1)
        lengths = [row.end for row in rows]
        counts = [row.end - row.begin for row in rows]
        positions = np.concatenate([np.arange(row.begin, row.end) for row in rows])
        parts = (table.ravel(), lengths, windows, counts, window_slots, np.concatenate(slots), positions)
        return np.concatenate(parts).astype(np.int32)

    # ---- contents ----

    def write(
        self,
        step: Step,
        layer: int,
        key: Tensor,
        value: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        *,
        impl: str = "auto",
    ) -> None:
        """Put the new keys [T, N2, Dk] and values [T, N2, Dv] of a layer into its pages, and compress the windows that
        they complete. With `separate_key_values` they have 3 * N2 heads, of which the first N2 are compressed. The
        modules do this themselves."""
        config = self.config
        caches = ((self.keys, self.compressed_keys), (self.values, self.compressed_values))
        for (raw, compressed), tokens, weight in zip(caches, (key, value), (key_weight, value_weight), strict=True):
            raw[layer].flatten(0, 1).index_copy_(0, step.slots, tokens.detach().to(raw.dtype))
            nsa_compress_infer(
                config.branches("cache", raw[layer])[0],
                weight.detach().to(raw.dtype),
                step.window_slots,
                config.compress_block_size,
                config.compress_stride,
                self.page_size,
                block_table=step.table,
                actual_seq_len=step.lengths,
                cache=compressed[layer].flatten(0, 1),
                new_tokens=step.most,
                impl=impl,
            )


def _layout(rows: list[Row]) -> tuple[int, int, int]:
    """Rows, tokens, and the most tokens of a row."""
    counts = [row.end - row.begin for row in rows]
    return len(rows), sum(counts), max(counts)


def _check_count(name: str, number: Any) -> None:
    check_int(name, number)
    if number < 1:
        raise ArgumentValueError(name, "at least 1", number)
