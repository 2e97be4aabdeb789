"""Data that the tests of compress_infer share: random calls, and the operator once more as a naive loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.implementations import each_implementation

every_impl = each_implementation("compress_infer")


class Call(NamedTuple):
    """The tensors and numbers of a call, in the order of the forward functions; `page` for the public one."""

    input: Tensor
    weight: Tensor
    slots: Tensor
    table: Tensor | None
    lengths: Tensor
    cache: Tensor
    block: int
    stride: int
    new_tokens: int

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        values: Any = (function(value) if isinstance(value, Tensor) else value for value in self)
        return Call(*values)

    def to(self, device: torch.device) -> Call:
        return self.map(lambda tensor: tensor.to(device))

    def double(self) -> Call:
        return self._replace(input=self.input.double(), weight=self.weight.double(), cache=self.cache.double())

    def run(self, forward) -> Tensor:
        """The cache that `forward` makes of a copy of ours."""
        cache = self.cache.clone(memory_format=torch.preserve_format)
        forward(*self._replace(cache=cache))
        return cache

    def arguments(self, **changes) -> dict[str, Any]:
        """For the public function."""
        page = 16 if self.table is None else self.input.shape[1]
        plain = {
            "input": self.input,
            "weight": self.weight,
            "slot_mapping": self.slots,
            "compress_block_size": self.block,
            "compress_stride": self.stride,
            "page_block_size": page,
            "block_table": self.table,
            "actual_seq_len": self.lengths,
            "cache": self.cache,
            "new_tokens": self.new_tokens,
        }
        return plain | changes


def new_ends(length, block, stride, new_tokens) -> list[int]:
    """Where the new windows of a batch end, token by token."""
    newest = range(max(0, length - new_tokens) + 1, length + 1)
    return [end for end in newest if end >= block and (end - block) % stride == 0]


def make(
    lengths,
    heads=2,
    size=16,
    block=32,
    stride=16,
    page=16,
    new_tokens=1,
    dtype=torch.float32,
    seed=0,
    index=torch.int32,
) -> Call:
    """A random legal call. Whatever the operator has no business to read is garbage; page None packs the tokens.

    Every fifth slot or so is one to skip, and one page may serve several batches.
    """
    generator = torch.Generator().manual_seed(seed)

    def randint(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    batch, windows = len(lengths), -(-new_tokens // stride)
    ends = [new_ends(length, block, stride, new_tokens) for length in lengths]
    rows = batch * windows + 3
    slots = randint(-(2**31), 2**31, batch, windows)
    places = iter(torch.randperm(rows, generator=generator).tolist())
    for b in range(batch):
        for k in range(len(ends[b])):
            skip = int(randint(0, 5, 1)) == 0
            slots[b, k] = [-1, -(2**31), rows, 2**31 - 1][int(randint(0, 4, 1))] if skip else next(places)
    table = None
    shape: tuple[int, ...] = (sum(lengths) + int(randint(0, 3, 1)),)
    if page is not None:
        columns = -(-max(*lengths, 1) // page)
        shape = (batch * columns, page)
        table = randint(-(2**31), 2**31, batch, columns)
        for b in range(batch):
            if ends[b]:
                read = slice((ends[b][0] - block) // page, (ends[b][-1] - 1) // page + 1)
                table[b, read] = randint(0, shape[0], table[b, read].numel())
        table = table.to(index)
    return Call(
        randn(*shape, heads, size),
        randn(block, heads),
        slots.to(index),
        table,
        torch.tensor(lengths, dtype=torch.int32),
        randn(rows, heads, size),
        block,
        stride,
        new_tokens,
    )


def naive(call: Call) -> tuple[Tensor, list[int]]:
    """The cache that a call makes, in float64, and the rows that it writes: one token at a time."""
    cache, written, first = call.cache.double().clone(), [], 0
    for b, length in enumerate(call.lengths.tolist()):
        for k, end in enumerate(new_ends(length, call.block, call.stride, call.new_tokens)):
            total = torch.zeros(cache.shape[1:], dtype=torch.float64)
            for i in range(call.block):
                t = end - call.block + i
                if call.table is None:
                    token = call.input[first + t]
                else:
                    page = call.input.shape[1]
                    token = call.input[int(call.table[b, t // page]), t % page]
                total += token.double() * call.weight[i].double()[:, None]
            slot = int(call.slots[b, k])
            if 0 <= slot < cache.shape[0]:
                cache[slot] = total
                written.append(slot)
        first += length
    return cache, written


def assert_rest_untouched(actual: Tensor, call: Call, written: list[int]) -> None:
    rest = torch.ones(call.cache.shape[0], dtype=torch.bool)
    rest[written] = False
    assert torch.equal(actual.cpu()[rest], call.cache.cpu()[rest])
