"""Data that the tests of gated_combine share: implementations, inputs, and a second formula."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.implementations import each_implementation

every_impl = each_implementation("gated_combine")


def make(
    leading=(40,), heads=3, value_dim=16, dtype=torch.float32, gates=None, seed=0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A gradient of the output, and the arguments: three branches and their gates, in `gates` or the same dtype."""
    generator = torch.Generator().manual_seed(seed)
    size = (*leading, heads, value_dim)
    grad, *branches = (torch.randn(size, generator=generator).to(dtype) for _ in range(4))
    logits = 3 * torch.randn((*leading, heads, 3), generator=generator)
    first, second, third = branches
    return grad, (first, second, third, logits.to(gates or dtype))


def dense(compressed: Tensor, selected: Tensor, local: Tensor, gates: Tensor) -> Tensor:
    """The operator once more, in other words than reference.py: a contraction over stacked branches, in float64."""
    shares = 0.5 + 0.5 * torch.tanh(gates.double() / 2)
    return torch.einsum("b...d,...b->...d", torch.stack((compressed, selected, local)).double(), shares)


def dense_grad(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(dense(*leaves), leaves, grad.double())
