"""Data that the tests of compress share: implementations, a second formula, and CANN's and MindSpore's own cases."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.implementations import each_implementation

every_impl = each_implementation("compress")


def ends_of(lengths) -> list[int]:
    return [int(end) for end in accumulate(lengths)]


def make(lengths, heads=2, head_size=16, block=32, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor, list[int]]:
    """Input, weight and prefix sums of segments of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ends = ends_of(lengths)
    input = torch.randn(ends[-1], heads, head_size, generator=generator).to(dtype)
    return input, torch.randn(block, heads, generator=generator).to(dtype), ends


def dense(input: Tensor, weight: Tensor, stride: int, ends: list[int]) -> Tensor:
    """The operator once more, in other words than reference.py: unfolded segments, contracted, in float64."""
    input, weight = input.double(), weight.double()
    lengths = np.diff(np.asarray(ends), prepend=0).tolist()
    parts = [
        torch.einsum("cndl,ln->cnd", segment.unfold(0, weight.shape[0], stride), weight)
        for segment in input.split(lengths)
        if segment.shape[0] >= weight.shape[0]
    ]
    return torch.cat(parts) if parts else input[:0]


def dense_grad(grad: Tensor, input: Tensor, weight: Tensor, stride: int, ends: list[int]) -> tuple[Tensor, Tensor]:
    input, weight = input.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    output = dense(input, weight, stride, ends)
    input_grad, weight_grad = torch.autograd.grad(output, (input, weight), grad.double(), materialize_grads=True)
    return input_grad, weight_grad


class MindSporeCase(NamedTuple):
    """One row of the table of MindSpore's own tests, with the sizes that it has to produce."""

    heads: int
    head_size: int
    block: int
    stride: int
    lengths: list[int]
    seed: int
    dtype: torch.dtype
    tokens: int
    rows: int
    bound: int = 0  # the lengths were drawn below it, from the stream that then gives the values; 0: they were given


def _drawn(heads, head_size, block, stride, t_max, segments, seed, dtype, tokens, rows) -> MindSporeCase:
    bound = t_max // segments + 2
    lengths = np.random.default_rng(seed).integers(0, bound, size=segments)
    if lengths.max() < block:
        lengths[-1] = block
    return MindSporeCase(heads, head_size, block, stride, lengths.tolist(), seed, dtype, tokens, rows, bound)


MINDSPORE_CASES = [
    _drawn(4, 128, 16, 16, 400, 24, 1011, torch.float16, 159, 2),
    _drawn(4, 128, 16, 16, 512, 24, 1001, torch.float16, 239, 7),
    _drawn(8, 128, 32, 16, 768, 30, 2027, torch.float16, 373, 1),
    _drawn(4, 128, 64, 16, 800, 28, 2, torch.float16, 431, 1),
    _drawn(128, 256, 128, 16, 2048, 64, 3, torch.float16, 1100, 1),
    _drawn(4, 128, 16, 16, 400, 16, 22, torch.bfloat16, 203, 7),
    _drawn(1, 16, 32, 32, 256, 20, 404, torch.float16, 151, 1),
    _drawn(8, 128, 32, 16, 768, 40, 505, torch.bfloat16, 456, 1),
    MindSporeCase(4, 128, 32, 16, [32, 48, 63, 16, 17, 31], 606, torch.float16, 207, 5),
    MindSporeCase(4, 128, 32, 16, [13, 26, 29, 8, 3, 18, 20, 24], 9, torch.float16, 141, 0),
]


def mindspore_data(case: MindSporeCase) -> tuple[Tensor, Tensor, list[int]]:
    """Input and weight as MindSpore's generator draws them."""
    generator = np.random.default_rng(case.seed)
    if case.bound:
        generator.integers(0, case.bound, size=len(case.lengths))
    input = generator.standard_normal((case.tokens, case.heads, case.head_size)).astype(np.float32)
    weight = generator.standard_normal((case.block, case.heads)).astype(np.float32)
    return torch.from_numpy(input).to(case.dtype), torch.from_numpy(weight).to(case.dtype), ends_of(case.lengths)


def assert_mindspore_close(actual: Tensor, golden: Tensor, reduction: int) -> None:
    """MindSpore's single_golden_compare: a bound on every error and a bound on the bias."""
    exponent = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 14}[actual.dtype]
    threshold = 2.0**-exponent * (10 if reduction >= 2048 else 1)
    bias = 2.0 ** -(exponent if actual.dtype == torch.float32 else exponent - 1)
    scale = golden.abs().clamp(min=1)
    error = (actual.to(golden.dtype) - golden) / scale
    if error.numel():
        assert error.abs().max() <= threshold
        assert error.mean().abs() < bias


def assert_cann_close(actual: Tensor, golden: Tensor, precision: float = 1e-3) -> None:
    """op-plugin's assertRtolEqual for float16: a few elements may miss a relative and an absolute bound."""
    difference = (actual.double() - golden.double()).abs()
    relative = difference / (torch.maximum(actual.double().abs(), golden.double().abs()) + 1e-10)
    allowed = difference.numel() * precision
    misses = (int((error >= precision).sum()) for error in (relative, difference))
    assert min(misses) <= allowed
