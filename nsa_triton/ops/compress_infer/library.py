"""The registered operator nsa_triton::compress_infer.

It checks values itself: a graph made by torch.compile does not come through the checks of api.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import register
from nsa_triton.ops.compress_infer import reference
from nsa_triton.ops.compress_infer.contract import check_indices, check_metas
from nsa_triton.settings import settings


def _compress_infer(
    input: Tensor,
    weight: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    cache: Tensor,
    block_size: int,
    stride: int,
    page: int,
    new_tokens: int,
    impl: str,
) -> None:
    arguments = (input, weight, slot_mapping, block_table, lengths, cache, block_size, stride)
    check_metas(*arguments, page, new_tokens)
    if settings().check_indices:
        check_indices(input, slot_mapping, block_table, lengths, cache, block_size, stride, new_tokens)
    run(
        impl,
        input.dtype,
        kernels=lambda: launcher("compress_infer").forward(*arguments, new_tokens),
        reference=lambda: reference.forward(*arguments, new_tokens),
    )


def _compress_infer_fake(
    input: Tensor,
    weight: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    cache: Tensor,
    block_size: int,
    stride: int,
    page: int,
    new_tokens: int,
    impl: str,
) -> None:
    tensors = (input, weight, slot_mapping, block_table, lengths, cache)
    check_metas(*tensors, block_size, stride, page, new_tokens, mode=mode_in_force())


_TENSORS = "Tensor input, Tensor weight, Tensor slot_mapping, Tensor? block_table, Tensor actual_seq_len"
_INTEGERS = "int compress_block_size, int compress_stride, int page_block_size, int new_tokens"

compress_infer: Callable[..., None] = register(
    "compress_infer",
    f"({_TENSORS}, Tensor(a!) cache, {_INTEGERS}, str impl) -> ()",
    _compress_infer,
    _compress_infer_fake,
)
