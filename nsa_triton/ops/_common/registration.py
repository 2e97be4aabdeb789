"""Operators of PyTorch: schema, implementation, fake and gradient, registered in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nsa_triton.errors import ArgumentValueError

NAMESPACE = "nsa_triton"
# PrivateUse1 is what Ascend NPUs are to PyTorch; by this name it needs no torch_npu.
DISPATCH_KEYS = ("CPU", "CUDA", "PrivateUse1")

# Registrations live as long as this object.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    name: str,
    signature: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `nsa_triton::<name>`; return it as a callable that torch.compile can trace."""
    qualified = f"{NAMESPACE}::{name}"
    _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    for key in DISPATCH_KEYS:
        _LIBRARY.impl(name, implementation, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operator


def differentiable_once(function: str) -> Callable[..., None]:
    """The `backward` of an operator that computes the gradient of `function`: a refusal. With none, a loss that is made
    of gradients would lose terms in silence."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise ArgumentValueError("create_graph", f"False: {function} is differentiable once", True)

    return refuse
