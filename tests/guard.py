"""Guarded memory: a kernel that reads or writes one byte outside its tensors is caught, not merely lucky."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_FORBIDDEN = 0  # PROT_NONE; the mmap module does not name it
_FAULTS = (signal.SIGSEGV, signal.SIGBUS)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class OutOfBoundsError(AssertionError):
    """The function touched memory beside one of its tensors."""


def run_guarded(
    function: Callable[..., Any], tensors: Mapping[str, Tensor], side: Literal["after", "before"] = "after"
) -> dict[str, Tensor]:
    """Call `function(**tensors)` in a forked child and return the tensors as the child left them.

    The child's tensors end where a forbidden page begins (side="after"), or begin where one ends (side="before").
    Strides are kept. Raises OutOfBoundsError where the child dies of a memory fault, RuntimeError with the child's
    traceback where it raises. Torch runs on one thread in the child: a fork does not take the other threads along.
    """
    guarded = {name: _guard(tensor, side) for name, tensor in tensors.items()}
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(function, guarded, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        failure = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in _FAULTS:
            raise OutOfBoundsError(f"out of bounds: memory {side} a tensor was touched ({signal.strsignal(number)})")
        raise RuntimeError(f"the guarded function died: {signal.strsignal(number)}")
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the guarded function raised:\n{failure}")
    return {name: tensor.clone() for name, tensor in guarded.items()}


def _run_child(function: Callable[..., Any], tensors: Mapping[str, Tensor], writer: int) -> None:
    """Never returns; the results travel through the shared memory of the tensors."""
    status = 1
    try:
        faulthandler.disable()  # a fault is an expected outcome: the parent reports it
        torch.set_num_threads(1)
        function(**tensors)
        status = 0
    except BaseException:  # noqa: BLE001  whatever it is, the parent must hear of it and the child must end here
        os.write(writer, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _guard(tensor: Tensor, side: str) -> Tensor:
    """A copy of `tensor` in shared memory, flush with a forbidden page."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    used = extent * tensor.element_size()
    pages = -(-used // _PAGE) * _PAGE
    memory = mmap.mmap(-1, pages + 2 * _PAGE)  # shared with the child
    begin = _PAGE if side == "before" else _PAGE + pages - used
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    for start in (0, _PAGE + pages):
        if _libc.mprotect(whole.data_ptr() + start, _PAGE, _FORBIDDEN) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    data = whole[begin : begin + used].view(tensor.dtype)
    placed = data.as_strided(tensor.shape, tensor.stride(), data.storage_offset())
    return placed.copy_(tensor) if extent else placed
