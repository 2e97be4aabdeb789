"""The specification of gated_combine and its gradient as readable PyTorch.

With the branches x_0, x_1, x_2 (compressed, selected, local) and a gate z_i for each, for every token and head:

    output[:]   = sum over i of  sigmoid(z_i) * x_i[:]
    x_i_grad[:] = sigmoid(z_i) * grad[:]
    z_i_grad    = sigmoid(z_i) * sigmoid(-z_i) * sum over Dv of  grad[:] * x_i[:]

All of it is float32, or float64 for float64 branches, and is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(compressed: Tensor, selected: Tensor, local: Tensor, gates: Tensor) -> Tensor:
    """The output [..., N1, Dv] of three branches [..., N1, Dv] and gates [..., N1, 3]."""
    wide = _wide(compressed)
    first, second, third = (
        torch.sigmoid(gate).unsqueeze(-1) * branch.to(wide)
        for gate, branch in zip(gates.to(wide).unbind(-1), (compressed, selected, local), strict=True)
    )
    return (first + second + third).to(compressed.dtype)


def backward(
    grad: Tensor, compressed: Tensor, selected: Tensor, local: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the three branches and of the gates, from that of the output."""
    wide = _wide(compressed)
    rows, logits = grad.to(wide), gates.to(wide)
    shares = torch.sigmoid(logits)
    products = torch.stack([(rows * branch.to(wide)).sum(-1) for branch in (compressed, selected, local)], dim=-1)
    gates_grad = shares * torch.sigmoid(-logits) * products
    first, second, third = ((share.unsqueeze(-1) * rows).to(grad.dtype) for share in shares.unbind(-1))
    return first, second, third, gates_grad.to(gates.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
