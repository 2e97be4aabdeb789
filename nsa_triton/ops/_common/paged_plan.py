"""What the launches of the paged attention operators are planned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nsa_triton.ops._common.plans import AttentionPlan
from nsa_triton.runtime.configs import Config, lookup
from nsa_triton.runtime.target import Target

JOINED = 8  # outputs of splits that are added at once


class PagedPlan(AttentionPlan):
    """Target and shapes of one call on packed queries [T, N1, DK] and caches [pages, page, N2, D]."""

    def __init__(self, op: str, target: Target, query: Tensor, key: Tensor, value: Tensor, block_table: Tensor) -> None:
        super().__init__(target, query, value)
        self.op = op
        self.pages, self.page = value.shape[:2]
        self.batch, self.pages_per_batch = block_table.shape
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
