"""What `check` and `simulate` share: how a case is named, and how its numbers are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nsa_triton.ops._common.accuracy import Accuracy, judge
from nsa_triton.ops._common.cases import CheckCase

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def judged(case: CheckCase, outputs: Sequence[Tensor]) -> Iterator[tuple[str, Accuracy]]:
    """Each output by name with its error against float64, and what eager PyTorch in the same dtype allows it."""
    expected, eager = case.reference(lambda tensor: tensor.double()), case.reference(lambda tensor: tensor)
    for name, terms, ours, theirs, truth in zip(case.outputs, case.terms, outputs, eager, expected, strict=True):
        yield name, judge(ours, theirs, truth, terms=terms)
