"""The specification of compress_infer as readable PyTorch.

A window of a sequence ends where E >= l tokens are complete and (E - l) % d == 0. For the windows of each batch that
its last `new_tokens` tokens complete, in order, and the slots of the batch:

    cache[slot, n, :] = sum over i of  weight[i, n] * raw[E - l + i, n, :]

where raw are the tokens of the batch, from its pages or, packed, from behind the tokens of the batches before it. Sums
are float32, or float64 for float64 tensors, and are rounded once. A slot that is not in the cache is skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()  # the cache is no part of a graph, which would grow step by step
def forward(
    input: Tensor,
    weight: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    cache: Tensor,
    compress_block_size: int,
    compress_stride: int,
    new_tokens: int,
) -> None:
    """Write the new windows into `cache`. Reads lengths back to the host."""
    weights = _widened(weight).unsqueeze(-1)  # [l, N, 1]
    slots = slot_mapping.reshape(lengths.shape[0], -1)
    begin = 0
    for batch, length in enumerate(lengths.tolist()):
        starts = new_starts(length, compress_block_size, compress_stride, new_tokens)
        for column, start in enumerate(starts):
            if block_table is None:
                window = input[begin + start : begin + start + compress_block_size]
            else:
                window = _paged(input, block_table[batch], start, compress_block_size)
            slot = int(slots[batch, column])
            if 0 <= slot < cache.shape[0]:
                cache[slot] = (weights[: len(window)] * _widened(window)).sum(0).to(cache.dtype)
        begin += max(length, 0)


def new_starts(length: int, compress_block_size: int, compress_stride: int, new_tokens: int) -> list[int]:
    """The first token of each window that the last `new_tokens` of `length` tokens complete."""
    ends = range(compress_block_size, length + 1, compress_stride)
    return [end - compress_block_size for end in ends if end > length - new_tokens]


def _paged(input: Tensor, pages: Tensor, start: int, count: int) -> Tensor:
    """The tokens [count, N, D] of a batch from `start` on; what is not in the table or the cache is clamped into it."""
    positions = torch.arange(start, start + count, device=input.device)
    columns = (positions // input.shape[1]).clamp(max=pages.shape[0] - 1)
    ids = pages[columns].long().clamp(0, input.shape[0] - 1)
    return input[ids, positions % input.shape[1]]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
