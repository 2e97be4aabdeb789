"""The specification of compress and its gradient as readable PyTorch.

For output row r, whose window starts at token start(r):

    output[r, n, :]       = sum over i of  weight[i, n] * input[start(r) + i, n, :]
    input_grad[t, n, :]   = sum over r of  weight[t - start(r), n] * grad[r, n, :]     where the window of r covers t
    weight_grad[i, n]     = sum over r and D of  grad[r, n, :] * input[start(r) + i, n, :]

Sums are float32, or float64 for float64 tensors, and are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_starts(compress_block_size: int, compress_stride: int, ends: tuple[int, ...]) -> list[int]:
    """The first token of each window. Windows do not leave their segment; tokens that fill no window are dropped."""
    starts: list[int] = []
    begin = 0
    for end in ends:
        starts.extend(range(begin, end - compress_block_size + 1, compress_stride))
        begin = end
    return starts


def forward(
    input: Tensor, weight: Tensor, compress_block_size: int, compress_stride: int, ends: tuple[int, ...]
) -> Tensor:
    """The output [T', N, D] of input [T, N, D] and weight [l, N]."""
    tokens, weights = _widened(input), _widened(weight).unsqueeze(-1)  # [T, N, D], [l, N, 1]
    output = tokens.new_empty((0, *input.shape[1:]))
    starts = window_starts(compress_block_size, compress_stride, ends)
    if starts:
        output = torch.stack([(weights * tokens[start : start + compress_block_size]).sum(0) for start in starts])
    return output.to(input.dtype)


def backward(
    grad: Tensor, input: Tensor, weight: Tensor, compress_block_size: int, compress_stride: int, ends: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The gradients [T, N, D] and [l, N] of input and weight, from that of the output."""
    rows, tokens, weights = _widened(grad), _widened(input), _widened(weight).unsqueeze(-1)
    input_grad = tokens.new_zeros(input.shape)
    weight_grad = tokens.new_zeros(weight.shape)
    for row, start in zip(rows, window_starts(compress_block_size, compress_stride, ends), strict=True):
        window = slice(start, start + compress_block_size)
        input_grad[window] += weights * row
        weight_grad += (tokens[window] * row).sum(-1)
    return input_grad.to(input.dtype), weight_grad.to(weight.dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
