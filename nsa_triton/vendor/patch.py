"""The functions of this package in place of those of torch_npu, so that code moves here without being changed."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from nsa_triton.errors import ToolchainError
from nsa_triton.vendor import npu

FUNCTIONS: Mapping[str, Any] = {name: value for name, value in vars(npu).items() if name.startswith("npu_nsa_")}
_ABSENT = object()  # what a torch_npu that is too old to have a function has instead


@dataclass
class _Patched:
    """A module whose functions are replaced: what it had before, and how many patches are in force."""

    originals: Mapping[str, Any]
    in_force: int = 0


_PATCHED: dict[ModuleType, _Patched] = {}
_LOCK = threading.Lock()


class TorchNpuPatch:
    """What `patch_torch_npu` returns. `undo()`, or the end of a `with` block, takes it back."""

    def __init__(self, module: ModuleType) -> None:
        self._module: ModuleType | None = module
        with _LOCK:
            if module not in _PATCHED:
                _PATCHED[module] = _Patched({name: vars(module).get(name, _ABSENT) for name in FUNCTIONS})
            _PATCHED[module].in_force += 1
            for name, function in FUNCTIONS.items():
                setattr(module, name, function)

    def undo(self) -> None:
        """Take this patch back; again, or after a `with` block, it does nothing. torch_npu has its own functions again
        when no patch is left. What others put into their place meanwhile stays."""
        with _LOCK:
            module, self._module = self._module, None
            if module is None:
                return
            patched = _PATCHED[module]
            patched.in_force -= 1
            if patched.in_force == 0:
                _restore(module, _PATCHED.pop(module).originals)

    def __enter__(self) -> TorchNpuPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def _restore(module: ModuleType, originals: Mapping[str, Any]) -> None:
    for name, original in originals.items():
        if vars(module).get(name) is not FUNCTIONS[name]:
            continue
        if original is _ABSENT:
            delattr(module, name)
        else:
            setattr(module, name, original)


def patch_torch_npu() -> TorchNpuPatch:
    """Put the `npu_nsa_*` functions of this package into the module `torch_npu`, in place of CANN's closed ones.

    Code that calls `torch_npu.npu_nsa_*` then runs these kernels, unchanged, on tensors on any device. Functions that
    an older torch_npu lacks are added. Names that were imported before (`from torch_npu import npu_nsa_compress`) and
    `torch.ops.npu` stay what they were.

    Patches may be nested and undone in any order: torch_npu has its own functions again when all of them are undone.

    Returns:
        A context manager that undoes the patch at the end of its `with` block, and has `undo()` for use without one.

    Raises:
        ToolchainError: torch_npu cannot be imported.

    Example:
        >>> with nsa_triton.patch_torch_npu():
        ...     loss = model(batch)  # calls torch_npu.npu_nsa_select_attention
    """
    return TorchNpuPatch(_torch_npu())


def _torch_npu() -> ModuleType:
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:  # OSError: a library of CANN is not found
        raise ToolchainError(
            f"torch_npu cannot be imported ({error}): there is nothing to patch. Code that need not run on both calls "
            "nsa_triton.npu_nsa_* instead, which needs no torch_npu",
            ("pip install 'nsa_triton[npu]'    # with CANN, whose set_env.sh must have been sourced", "nsa-triton env"),
        ) from error
