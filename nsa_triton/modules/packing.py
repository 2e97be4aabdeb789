"""From padded or packed tokens to packed ones, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentValueError
from nsa_triton.modules.cache import Step
from nsa_triton.ops._common.arguments import check_tensor
from nsa_triton.ops._common.lengths import host_ints

if TYPE_CHECKING:
    import numpy as np

    Lengths = Sequence[int] | np.ndarray[Any, Any] | Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of each sequence are.

    cu_seqlens  where sequences begin and end in the packed tokens; None where a step says it
    padded      S, tokens per line of a padded batch; None for packed tokens
    step        of new tokens in a cache, or None
    """

    cu_seqlens: tuple[int, ...] | None
    padded: int | None
    step: Step | None

    @classmethod
    def of(
        cls, hidden: Tensor, size: int, cu_seqlens: Lengths | None, lengths: Lengths | None, step: Step | None
    ) -> Packing:
        """The packing of a call, checked."""
        check_tensor("hidden", hidden)
        if hidden.dim() not in (2, 3) or hidden.shape[-1] != size:
            expected = f"[T, {size}] (packed tokens) or [B, S, {size}] (padded)"
            raise ArgumentValueError("hidden.shape", expected, list(hidden.shape))
        padded = hidden.shape[1] if hidden.dim() == 3 else None
        given = {"cu_seqlens": cu_seqlens, "lengths": lengths, "step": step}
        allowed = ("lengths", "step") if padded is not None else ("cu_seqlens", "step")
        named = [name for name, value in given.items() if value is not None]
        for name in named:
            if name not in allowed or len(named) > 1:
                kind = "padded" if padded is not None else "packed"
                raise ArgumentValueError(
                    name, f"None, or no other of {', '.join(allowed)} for {kind} tokens", "a value"
                )
        if step is not None:
            return cls._of_step(hidden, padded, step)
        if padded is not None:
            batch = hidden.shape[0]
            return cls(
                _bounds_of_lengths([padded] * batch if lengths is None else lengths, batch, padded), padded, None
            )
        return cls(checked_cu_seqlens(cu_seqlens, hidden.shape[0]), None, None)

    @classmethod
    def _of_step(cls, hidden: Tensor, padded: int | None, step: Step) -> Packing:
        tokens = hidden.shape[0] * (1 if padded is None else padded)
        if tokens != step.tokens:
            raise ArgumentValueError("hidden", f"the {step.tokens} tokens of the step", tokens)
        return cls(None, None, step)

    def pack(self, hidden: Tensor) -> Tensor:
        """[T, hidden_size]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self._is_dense(flat) else flat[self._rows(hidden.device)]

    def unpack(self, packed: Tensor, hidden: Tensor) -> Tensor:
        """Packed tokens in the shape of `hidden`, 0 where there is padding."""
        if not self._is_dense(hidden.reshape(-1, hidden.shape[-1])):
            flat = packed.new_zeros((hidden.shape[0] * hidden.shape[1], packed.shape[-1]))
            packed = flat.index_copy(0, self._rows(hidden.device), packed)
        return packed.view(hidden.shape)

    def positions(self, device: torch.device) -> Tensor:
        """[T] the place of each token in its sequence."""
        if self.step is not None:
            return self.step.positions
        parts = [torch.arange(end - begin) for begin, end in pairwise(self.cu_seqlens or (0,))]
        return torch.cat(parts).to(device) if parts else torch.zeros(0, dtype=torch.long, device=device)

    def _is_dense(self, flat: Tensor) -> bool:
        return self.padded is None or self.cu_seqlens is None or self.cu_seqlens[-1] == flat.shape[0]

    def _rows(self, device: torch.device) -> Tensor:
        """[T] the places of the real tokens in the padded batch."""
        padded = self.padded or 0
        lengths = [end - begin for begin, end in pairwise(self.cu_seqlens or (0,))]
        return torch.cat([torch.arange(b * padded, b * padded + n) for b, n in enumerate(lengths)]).to(device)


def host_lengths(values: Lengths, name: str) -> tuple[int, ...]:
    """The numbers of any accepted kind of list."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace the checks
        return tuple(values)
    return host_ints(values, name)


def checked_cu_seqlens(cu_seqlens: Lengths | None, tokens: int) -> tuple[int, ...]:
    """Where sequences begin and end in so many packed tokens, from 0 on."""
    if cu_seqlens is None:
        return (0, tokens)
    bounds = host_lengths(cu_seqlens, "cu_seqlens")
    if not bounds or bounds[0] != 0:
        hint = "Sequences of 80 and 96 tokens are [0, 80, 176]"
        raise ArgumentValueError("cu_seqlens", "numbers that begin with 0", list(bounds), hint)
    for begin, end in pairwise(bounds):
        if end < begin:
            raise ArgumentValueError("cu_seqlens", "numbers that never decrease", f"{end} after {begin}")
    if bounds[-1] != tokens:
        raise ArgumentValueError("cu_seqlens[-1]", f"{tokens}, the number of tokens", bounds[-1])
    return bounds


def _bounds_of_lengths(lengths: Lengths, batch: int, padded: int) -> tuple[int, ...]:
    given = host_lengths(lengths, "lengths")
    if len(given) != batch:
        raise ArgumentValueError("len(lengths)", f"{batch}, the sequences of the batch", len(given))
    for length in given:
        if not 0 <= length <= padded:
            raise ArgumentValueError("lengths", f"numbers from 0 to {padded}", length)
    return (0, *accumulate(given))
