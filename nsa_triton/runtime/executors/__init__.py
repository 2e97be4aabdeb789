"""How a kernel is launched on a kind of machine: one small protocol, one implementation per kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Executor(Protocol):
    """Runs a kernel on a one-dimensional grid and returns when its results can be used by the next launch."""

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: Mapping[str, Tensor | int | float],
        constexprs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None: ...
