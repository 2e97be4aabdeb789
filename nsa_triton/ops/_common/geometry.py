"""How compression windows and selection blocks lie to one another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """Sizes in raw tokens."""

    block: int  # l, of a compression window
    stride: int  # d, between windows
    select: int  # l', of a selection block
    shift: int  # 0 for CANN's scores, 1 for true overlap

    @property
    def strides(self) -> int:
        """M, strides per selection block."""
        return self.select // self.stride

    @property
    def reach(self) -> int:
        """NN, strides per window."""
        return self.block // self.stride

    def multiplicity(self, offset: np.ndarray) -> np.ndarray:
        """How often a compressed token counts for a block, `offset` tokens before the last one that does."""
        counts = np.minimum(np.minimum(offset + 1, self.reach), self.strides + self.reach - 1 - offset)
        positive: np.ndarray = np.maximum(counts, 0)
        return positive
