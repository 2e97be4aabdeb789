"""The registered operator nsa_triton::sliding_window_attention_infer.

It sees one layout, packed queries and caches with their heads apart, and checks shapes itself: torch.ops and graphs
made by torch.compile do not come through the checks of api.py. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.dense import with_dense_rows
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import register
from nsa_triton.ops.sliding_window_attention_infer import reference
from nsa_triton.ops.sliding_window_attention_infer.contract import check_call, refuse_bad_indices
from nsa_triton.settings import settings

OutputAndLse = tuple[Tensor, Tensor]


class Call(NamedTuple):
    """The arguments of the operator."""

    query: Tensor  # [T, N1, Dk]
    key: Tensor  # [pages, page, N2, Dk]
    value: Tensor  # [pages, page, N2, Dv]
    block_table: Tensor  # [B, max_blocks]
    lengths: Tensor  # [B] tokens
    rows: Tensor | None  # [B, 2] first row and query tokens; None: T / B tokens each
    scale: float
    window_size: int
    impl: str


def _sliding_window_attention_infer(*arguments: Any) -> OutputAndLse:
    call = Call(*arguments)
    _check(call, "structural")
    if call.query.shape[0] == 0:
        return _outputs(call)
    if settings().check_indices:
        refuse_bad_indices(call.query, call.key, *call[3:6], call.window_size)
    # Kernels want dense indices and rows of consecutive elements. These tensors are small; a cache is never copied.
    query = with_dense_rows(call.query)
    indices = [None if given is None else given.contiguous() for given in call[3:6]]
    dense: tuple[Any, ...] = (query, call.key, call.value, *indices, call.scale, call.window_size)

    def specification() -> OutputAndLse:
        output, lse = reference.forward(*dense)
        return output, lse.float()

    return run(
        call.impl,
        query.dtype,
        kernels=lambda: launcher("sliding_window_attention_infer").forward(*dense),
        reference=specification,
        argument="query",
    )


def _sliding_window_attention_infer_fake(*arguments: Any) -> OutputAndLse:
    call = Call(*arguments)
    _check(call, mode_in_force())
    return _outputs(call)


def _check(call: Call, mode: str) -> None:
    tensors = dict(zip(Call._fields[:6], call[:6], strict=True))
    check_call(tensors, {"window_size": call.window_size}, mode=mode)


def _outputs(call: Call) -> OutputAndLse:
    query = call.query
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    return query.new_empty((*query.shape[:2], call.value.shape[3])), lse


sliding_window_attention_infer: Callable[..., OutputAndLse] = register(
    "sliding_window_attention_infer",
    "(Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor lengths, Tensor? rows, float scale,"
    " int window_size, str impl) -> (Tensor, Tensor)",
    _sliding_window_attention_infer,
    _sliding_window_attention_infer_fake,
)
