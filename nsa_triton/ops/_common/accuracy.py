"""How results are judged: against the reference in float64, and no worse than eager PyTorch in the same dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Errors against float64. `limit` is the relative RMS error of eager PyTorch plus the slack of one summation."""

    max_error: float
    rms_error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.rms_error <= self.limit  # false for NaN


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double() - expected.double()
    scale = expected.double().pow(2).mean().sqrt()
    return float(difference.pow(2).mean().sqrt() / scale.clamp_min(torch.finfo(torch.float64).tiny))


def judge(actual: Tensor, eager: Tensor, expected: Tensor, *, terms: int) -> Accuracy:
    """Compare `actual` with `expected` (float64). `eager` is PyTorch's result in the dtype of `actual`, and `terms` the
    number of products summed per element, which float32 sums in another order may see differently by √terms · eps."""
    if actual.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0)
    slack = math.sqrt(terms) * torch.finfo(torch.float32).eps
    max_error = float((actual.double() - expected.double()).abs().max())
    return Accuracy(max_error, relative_rms(actual, expected), relative_rms(eager, expected) * 1.001 + slack)
