"""In which dtypes the tests of kernels run their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shapes_in_dtypes(shapes: Sequence[Any], own: Sequence[torch.dtype], thorough: Any = None) -> pytest.MarkDecorator:
    """Every shape in its own dtype, and shape `thorough` in all of them; the rest of the product is slow.

    A shape finds what is wrong with tails and tiles in any dtype, and a dtype what is wrong with rounding in any
    shape; but each pair of them is compiled anew, for seconds.
    """
    pairs = [
        pytest.param(shape, dtype, marks=() if dtype is one or shape is thorough else pytest.mark.slow)
        for shape, one in zip(shapes, own, strict=True)
        for dtype in DTYPES
    ]
    return pytest.mark.parametrize(("shape", "dtype"), pairs, ids=str)
