"""Registered operators of attention over paged caches, in the steps that all of them take.

Such an operator sees one layout, packed queries and caches with their heads apart, and checks shapes itself: torch.ops
and graphs made by torch.compile do not come through the checks of api.py. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.dense import with_dense_rows
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import register
from nsa_triton.settings import settings

OutputAndLse = tuple[Tensor, Tensor]


def register_paged_attention(
    name: str,
    signature: str,
    call_type: Any,
    *,
    check_call: Callable[..., None],
    refuse_bad_indices: Callable[[Any], None],
    reference: Callable[..., OutputAndLse],
) -> Callable[..., OutputAndLse]:
    """Register an operator whose arguments are those of the NamedTuple `call_type`: query, key, value, index tensors,
    `scale`, numbers that `check_call` takes, and `impl`. Its launch and its `reference` take all of them but impl."""
    fields = call_type._fields
    scale_at = fields.index("scale")

    def operator(*arguments: Any) -> OutputAndLse:
        call = call_type(*arguments)
        check(call, "structural")
        if call.query.shape[0] == 0:
            return outputs(call)
        if settings().check_indices:
            refuse_bad_indices(call)
        # Kernels want dense indices and rows of consecutive elements. These tensors are small; a cache is never copied.
        query = with_dense_rows(call.query)
        indices = [None if given is None else given.contiguous() for given in call[3:scale_at]]
        dense = (query, call.key, call.value, *indices, *call[scale_at:-1])

        def specification() -> OutputAndLse:
            output, lse = reference(*dense)
            return output, lse.float()

        return run(
            call.impl,
            query.dtype,
            kernels=lambda: launcher(name).forward(*dense),
            reference=specification,
            argument="query",
        )

    def fake(*arguments: Any) -> OutputAndLse:
        call = call_type(*arguments)
        check(call, mode_in_force())
        return outputs(call)

    def check(call: Any, mode: str) -> None:
        tensors = dict(zip(fields[:scale_at], call[:scale_at], strict=True))
        numbers = dict(zip(fields[scale_at + 1 : -1], call[scale_at + 1 : -1], strict=True))
        check_call(tensors, numbers, mode=mode)

    return register(name, signature, operator, fake)


def outputs(call: Any) -> OutputAndLse:
    """What the operator returns, not written yet."""
    query = call.query
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    return query.new_empty((*query.shape[:2], call.value.shape[3])), lse
