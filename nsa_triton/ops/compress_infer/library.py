"""The registered operator nsa_triton::compress_infer.

It checks values itself: a graph made by torch.compile does not come through the checks of api.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import register
from nsa_triton.ops.compress_infer import reference
from nsa_triton.ops.compress_infer.contract import check_indices, check_metas
from nsa_triton.settings import settings


class Call(NamedTuple):
    """The arguments of the operator."""

    input: Tensor  # [pages, page, N, D], or [T, N, D] without block_table
    weight: Tensor  # [l, N]
    slot_mapping: Tensor  # [B, W], or [B]
    block_table: Tensor | None  # [B, max_blocks]
    lengths: Tensor  # [B]
    cache: Tensor  # [rows, N, D], changed in place
    block_size: int
    stride: int
    page: int
    new_tokens: int
    impl: str


def _compress_infer(*arguments: Any) -> None:
    call = Call(*arguments)
    check_metas(*call[:-1])
    tensors, numbers = call[:6], (call.block_size, call.stride, call.new_tokens)
    if settings().check_indices:
        check_indices(call.input, *call[2:6], *numbers)
    run(
        call.impl,
        call.input.dtype,
        kernels=lambda: launcher("compress_infer").forward(*tensors, *numbers),
        reference=lambda: reference.forward(*tensors, *numbers),
    )


def _compress_infer_fake(*arguments: Any) -> None:
    check_metas(*Call(*arguments)[:-1], mode=mode_in_force())


_TENSORS = "Tensor input, Tensor weight, Tensor slot_mapping, Tensor? block_table, Tensor actual_seq_len"
_INTEGERS = "int compress_block_size, int compress_stride, int page_block_size, int new_tokens"

compress_infer: Callable[..., None] = register(
    "compress_infer",
    f"({_TENSORS}, Tensor(a!) cache, {_INTEGERS}, str impl) -> ()",
    _compress_infer,
    _compress_infer_fake,
)
