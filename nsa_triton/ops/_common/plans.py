"""What the launches of one call are planned from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsa_triton.runtime.configs import Config
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target


def cut_length(whole: int, most: int) -> int:
    """Tokens per tile: the longest multiple of 16 up to `most` that divides a page or a block, so that no tile
    straddles two."""
    return max(length for length in range(16, min(whole, max(16, most)) + 1, 16) if whole % length == 0)


class CallPlan:
    """Target of one call, and the dtype and device of its tensors, which are those of `tensor`."""

    def __init__(self, target: Target, tensor: Tensor) -> None:
        self.target, self.dtype, self.device = target, tensor.dtype, tensor.device

    def launch(
        self,
        kernel: Any,
        items: int,
        arguments: dict[str, Any],
        constexprs: dict[str, Any],
        config: Config,
        *,
        uses_cube: bool = False,
    ) -> Launch:
        programs = self.target.programs(items, uses_cube=uses_cube)
        options = config.options.get(self.target.kind, {})
        return Launch(kernel, programs, arguments, constexprs, options, config.ub_limit)


class AttentionPlan(CallPlan):
    """The heads too: of queries [T, N1, DK] and values [..., N2, DV]."""

    def __init__(self, target: Target, query: Tensor, value: Tensor) -> None:
        super().__init__(target, query)
        self.tokens, self.heads, self.key_dim = query.shape
        self.kv_heads, self.value_dim = value.shape[-2:]
        self.group = self.heads // self.kv_heads

    def dot_tile(self, size: int) -> int:
        """A side of a matrix product: exact on Ascend, at least 16 and a power of two elsewhere."""
        return size if self.target.is_ascend_code else max(16, self.target.tile(size))

    @property
    def head_tiles(self) -> dict[str, int]:
        """The head sizes, and the tiles that hold them."""
        return {
            "DK": self.key_dim,
            "DV": self.value_dim,
            "BK": self.dot_tile(self.key_dim),
            "BV": self.dot_tile(self.value_dim),
        }
