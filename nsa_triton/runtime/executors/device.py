"""Launch on real hardware: Ascend NPUs through triton-ascend, CUDA GPUs through upstream Triton."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nsa_triton.ascend.toolchain import require, triton_problem


class DeviceExecutor:
    """Kernels go through the JIT of the Triton that belongs to the device. Options are those of the target's configs:
    `multibuffer` and the like on an NPU, num_warps and num_stages on a GPU."""

    def __init__(self, kind: str, device: torch.device) -> None:
        require(triton_problem("triton-ascend" if kind == "npu" else "triton"))
        self.device = device

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: Mapping[str, Tensor | int | float],
        constexprs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        with self._current_device():
            kernel[(programs,)](**arguments, **constexprs, **options)

    def _current_device(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return torch.npu.device(self.device)  # type: ignore[attr-defined, no-any-return]
