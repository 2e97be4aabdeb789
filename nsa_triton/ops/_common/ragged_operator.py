"""Registered operators of training attention over ragged sequences, in the steps that all of them take.

Each is two operators: attention, and its gradient, which is that of the first output and refuses to be differentiated.
They check shapes and lengths themselves: torch.ops and graphs made by torch.compile do not come through the checks of
api.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.dense import with_dense_rows
from nsa_triton.ops._common.implementation import launcher, run
from nsa_triton.ops._common.registration import differentiable_once, register

Gradients = tuple[Tensor, Tensor, Tensor]
Operator = Callable[..., Any]  # returns tensors
New = Callable[..., Tensor]  # Tensor.new_empty or Tensor.new_zeros


def register_ragged_attention(
    family: str, forward: Direction, backward: Direction, outputs: tuple[str, ...]
) -> tuple[Operator, Operator]:
    """Register the operators `family` and `family`_grad, whose kernels the launch.py of that family runs.

    `outputs` names the results of the first: those that the second takes have the names of its arguments, which else
    are those of the first, behind `grad`.
    """
    fields = backward.call_type._fields
    behind = fields.index("query_ends")
    tensors, others = fields[1:behind], fields[behind:]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        call = forward.call_type(*inputs)
        known = {**call._asdict(), **dict(zip(outputs, output, strict=True))}
        ctx.save_for_backward(*(known[name] for name in tensors))
        ctx.others = tuple(known[name] for name in others)

    def differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = gradient(grad, *ctx.saved_tensors, *ctx.others)
        return (*gradients, *(None for _ in forward.call_type._fields[len(gradients) :]))

    once = differentiable_once(f"nsa_{family}")
    gradient = register(
        f"{family}_grad", backward.signature, backward.operator(family, "backward"), backward.fake, backward=once
    )
    attention = register(
        family, forward.signature, forward.operator(family, "forward"), forward.fake,
        setup_context=save, backward=differentiate,
    )  # fmt: skip
    return attention, gradient


@dataclass(frozen=True)
class Direction:
    """One of the two operators.

    signature      arguments and results, in the words of PyTorch's schemas
    call_type      a NamedTuple of the arguments: tensors, then query_ends, key_ends, scale, …, impl
    check          refuses a call, in a mode of the limits
    canonical      the call with its tensors as kernels and specification want them
    specification  the results, of all arguments but impl
    results        what is returned, made by the tensors' new_empty or new_zeros
    """

    signature: str
    call_type: Any
    check: Callable[[Any, str], None]
    canonical: Callable[[Any], Any]
    specification: Operator
    results: Callable[[Any, New], tuple[Tensor, ...]]

    def operator(self, family: str, launched: str) -> Operator:
        """What runs the function `launched` of the family's launch.py, or the specification."""

        def compute(*arguments: Any) -> Any:
            call = self.call_type(*arguments)
            self.check(call, "structural")
            if 0 in call.query.shape[:2]:
                return self.results(call, Tensor.new_zeros)
            *parts, _ = (tuple(part) if isinstance(part, list) else part for part in self.canonical(call))
            return run(
                call.impl,
                call.query.dtype,
                kernels=lambda: getattr(launcher(family), launched)(*parts),
                reference=lambda: self.specification(*parts),
                argument="query",
            )

        return compute

    def fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self.call_type(*arguments)
        self.check(call, mode_in_force())
        return self.results(call, Tensor.new_empty)


def tensors_of(call: Any) -> dict[str, Tensor]:
    """The tensors among the arguments, by name."""
    return {name: part for name, part in call._asdict().items() if isinstance(part, Tensor)}


def with_rows(call: Any, *, but: Sequence[str] = ()) -> Any:
    """The call with tensors whose rows are of consecutive elements, all `but` these."""
    tensors = {name: tensor for name, tensor in tensors_of(call).items() if name not in but}
    return call._replace(**{name: with_dense_rows(tensor) for name, tensor in tensors.items()})


def gradients_of(call: Any, new: New) -> Gradients:
    """What a gradient returns: for each of query, key and value a tensor like it."""
    query, key, value = (new(tensor, tensor.shape) for tensor in (call.query, call.key, call.value))
    return query, key, value
