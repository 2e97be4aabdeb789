"""The registered operators nsa_triton::gated_combine and nsa_triton::gated_combine_grad.

They check shapes themselves: a graph made by torch.compile does not come through the checks of api.py. The gradient of
the first is the second, which refuses to be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import differentiable_once, register
from nsa_triton.ops.gated_combine import reference
from nsa_triton.ops.gated_combine.contract import check_tensors

FORWARD = ("compressed", "selected", "local", "gates")
BACKWARD = ("grad", *FORWARD)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _gated_combine(compressed: Tensor, selected: Tensor, local: Tensor, gates: Tensor, impl: str) -> Tensor:
    tensors = (compressed, selected, local, gates)
    check_tensors(dict(zip(FORWARD, tensors, strict=True)))
    if compressed.numel() == 0:
        return _output(compressed)
    return run(
        impl,
        compressed.dtype,
        kernels=lambda: launcher("gated_combine").forward(*tensors),
        reference=lambda: reference.forward(*tensors).contiguous(),
        argument="compressed",
    )


def _gated_combine_fake(compressed: Tensor, selected: Tensor, local: Tensor, gates: Tensor, impl: str) -> Tensor:
    check_tensors(dict(zip(FORWARD, (compressed, selected, local, gates), strict=True)), mode_in_force())
    return _output(compressed)


def _output(compressed: Tensor) -> Tensor:
    return compressed.new_empty(compressed.shape)


def _gated_combine_grad(*arguments: Any) -> Gradients:
    *tensors, impl = arguments
    check_tensors(dict(zip(BACKWARD, tensors, strict=True)))
    if tensors[0].numel() == 0:
        return _gradients(*tensors)
    first, second, third, of_gates = run(
        impl,
        tensors[0].dtype,
        kernels=lambda: launcher("gated_combine").backward(*tensors),
        reference=lambda: reference.backward(*tensors),
        argument="compressed",
    )
    return first.contiguous(), second.contiguous(), third.contiguous(), of_gates.contiguous()


def _gated_combine_grad_fake(*arguments: Any) -> Gradients:
    *tensors, _ = arguments
    check_tensors(dict(zip(BACKWARD, tensors, strict=True)), mode_in_force())
    return _gradients(*tensors)


def _gradients(grad: Tensor, *inputs: Tensor) -> Gradients:
    compressed, selected, local, gates = (tensor.new_empty(tensor.shape) for tensor in inputs)
    return compressed, selected, local, gates


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.impl = impl


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*gated_combine_grad(grad, *ctx.saved_tensors, ctx.impl), None)


_TENSORS = "Tensor compressed, Tensor selected, Tensor local, Tensor gates, str impl"

gated_combine: Callable[..., Tensor] = register(
    "gated_combine",
    f"({_TENSORS}) -> Tensor",
    _gated_combine,
    _gated_combine_fake,
    setup_context=_save,
    backward=_backward,
)
gated_combine_grad: Callable[..., Gradients] = register(
    "gated_combine_grad",
    f"(Tensor grad, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_combine_grad,
    _gated_combine_grad_fake,
    backward=differentiable_once("nsa_gated_combine"),
)
