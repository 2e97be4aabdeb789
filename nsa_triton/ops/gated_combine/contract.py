"""What a legal call of gated_combine is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import check, mode_in_force
from nsa_triton.ops._common import arguments
from nsa_triton.ops._common.arguments import Meta
from nsa_triton.ops._common.implementation import check_impl

BRANCHES = 3
LIKE = "compressed"  # what the other tensors are held against

Metas = tuple[tuple[str, Meta], ...]


def check_call(tensors: Mapping[str, Any], impl: Any) -> None:
    """Check a public call, types first. `tensors` are the branches, gates and, for the gradient, grad, by name."""
    if torch.compiler.is_compiling():  # the registered operators make the same checks
        return
    for name, tensor in tensors.items():
        arguments.check_tensor(name, tensor)
    check_impl(impl)
    check_tensors(tensors, mode_in_force())


def check_tensors(tensors: Mapping[str, torch.Tensor], mode: str = "structural") -> None:
    """Check dtypes, devices, shapes and limits, once for each kind of call."""
    call = tuple((name, Meta.of(tensor)) for name, tensor in tensors.items())
    sizes = [size for _, meta in call for size in meta.shape]
    # The symbolic ints of torch.compile have no value to cache by.
    function = _check_once if set(map(type, sizes)) <= {int} else _check
    function(call, mode)


def _check(call: Metas, mode: str) -> None:
    metas = dict(call)
    like = metas[LIKE]
    others = {name: meta for name, meta in call if name not in (LIKE, "gates")}  # of the shape and dtype of LIKE
    for name, meta in others.items():
        arguments.check_same_dtype(name, meta, LIKE, like)
    check("nsa_gated_combine", {"dtype": like.dtype}, mode)
    _check_gates_dtype(metas["gates"], like)
    for name, meta in call:
        arguments.check_same_device(name, meta, LIKE, like)
    if len(like.shape) < 2:
        raise ArgumentValueError(LIKE, "2 dimensions or more [..., N1, Dv]", f"shape {list(like.shape)}")
    for name, meta in others.items():
        _check_shape(name, meta, (*like.shape,), f"the shape of {LIKE}")
    _check_shape("gates", metas["gates"], (*like.shape[:-1], BRANCHES), "one for each token, head and branch")
    check("nsa_gated_combine", {"N1": like.shape[-2], "Dv": like.shape[-1]}, mode)


_check_once = functools.lru_cache(maxsize=128)(_check)


def _check_gates_dtype(gates: Meta, like: Meta) -> None:
    if gates.dtype not in (like.dtype, torch.float32):
        expected = f"{like.dtype}, the dtype of {LIKE}, or torch.float32"
        raise ArgumentTypeError("gates.dtype", expected, gates.dtype, "Convert them with .to(dtype)")


def _check_shape(argument: str, meta: Meta, shape: tuple[int, ...], why: str) -> None:
    if tuple(meta.shape) != shape:
        raise ArgumentValueError(f"{argument}.shape", f"{list(shape)}, {why}", list(meta.shape))
