"""The shape of the cases that every op folder declares in its cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nsa_triton.runtime.launch import Launch
    from nsa_triton.runtime.target import Target

Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CheckCase:
    """One call to judge: `run` uses the kernels; `reference` computes the same from inputs passed through a converter,
    to float64 for the truth, or unchanged for what eager PyTorch makes of them."""

    op: str
    shape: str
    dtype: torch.dtype
    outputs: tuple[str, ...]
    terms: tuple[int, ...]  # products summed per element of each output
    run: Callable[[], tuple[Tensor, ...]]
    reference: Callable[[Convert], tuple[Tensor, ...]]


@dataclass(frozen=True)
class CompileCase:
    """One shape whose launches are planned for a target and given to the Ascend compiler."""

    family: str
    shape: str
    plans: Callable[[Target], list[Launch]]
