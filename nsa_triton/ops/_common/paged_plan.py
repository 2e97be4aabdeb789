"""What the launches of both paged attention operators are planned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nsa_triton.runtime.configs import Config, lookup
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target

STATE = 8  # floats of a split's state, its maximum and sum: a row of 32 bytes, the least that an NPU moves
JOINED = 8  # outputs of splits that are added at once


def cut_length(page: int, most: int) -> int:
    """Tokens per tile: the longest multiple of 16 up to `most` that divides a page, so that no tile straddles two."""
    return max(length for length in range(16, min(page, max(16, most)) + 1, 16) if page % length == 0)


class PagedPlan:
    """Target and shapes of one call on packed queries [T, N1, DK] and caches [pages, page, N2, D]."""

    def __init__(self, op: str, target: Target, query: Tensor, key: Tensor, value: Tensor, block_table: Tensor) -> None:
        self.op, self.target = op, target
        self.dtype, self.device = query.dtype, query.device
        self.tokens, self.heads, self.key_dim = query.shape
        self.pages, self.page, self.kv_heads, self.value_dim = value.shape
        self.batch, self.pages_per_batch = block_table.shape
        self.group = self.heads // self.kv_heads
        self._strides = (query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3])

    def config(self, kernel: str, tiles: tuple[str, ...], more: Mapping[str, Any]) -> Config:
        key = {
            "itemsize": self.dtype.itemsize,
            "head_dim": max(self.key_dim, self.value_dim),
            "value_dim": self.value_dim,
            "group": self.group,
            **more,
        }
        return lookup(self.op, kernel, self.target, key, self.pages_per_batch * self.page, tiles)

    @property
    def strides(self) -> dict[str, int]:
        return dict(zip(("q_t", "q_h", "k_p", "k_i", "k_n", "v_p", "v_i", "v_n"), self._strides, strict=True))

    @property
    def head_tiles(self) -> dict[str, int]:
        """The head sizes, and the tiles that hold them."""
        return {
            "DK": self.key_dim,
            "DV": self.value_dim,
            "BK": self.dot_tile(self.key_dim),
            "BV": self.dot_tile(self.value_dim),
        }

    def dot_tile(self, size: int) -> int:
        """A side of a matrix product: exact on Ascend, at least 16 and a power of two elsewhere."""
        return size if self.target.is_ascend_code else max(16, self.target.tile(size))

    def launch(
        self,
        kernel: Any,
        items: int,
        arguments: dict[str, Any],
        constexprs: dict[str, Any],
        config: Config,
        *,
        uses_cube: bool,
    ) -> Launch:
        programs = self.target.programs(items, uses_cube=uses_cube)
        return Launch(kernel, programs, arguments, constexprs, config.options.get(self.target.kind, {}))
