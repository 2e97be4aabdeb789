"""What a legal call of sliding_window_attention and of its gradient is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import check, mode_in_force
from nsa_triton.ops._common import arguments, ragged_contract
from nsa_triton.ops._common.arguments import Meta, check_rank, check_same_device
from nsa_triton.ops._common.implementation import check_impl
from nsa_triton.ops._common.ragged_contract import Ends, Numbers, prefix_sums

OP = "nsa_sliding_window_attention"
QLEN, KVLEN = "actual_seq_qlen", "actual_seq_kvlen"


def checked_ends(
    tensors: Mapping[str, Any],
    *,
    scale_value: Any,
    head_num: Any,
    window_size: Any,
    actual_seq_qlen: Any,
    actual_seq_kvlen: Any,
    impl: Any,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check a public call, types first, and return the prefix sums of queries and of keys.

    `tensors` are those that the operator gets.
    """
    lengths = {QLEN: actual_seq_qlen, KVLEN: actual_seq_kvlen}
    if torch.compiler.is_compiling():  # Dynamo cannot trace the checks below; the registered operators make them too
        if head_num != tensors["query"].shape[1]:  # but do not see head_num
            raise ArgumentValueError("head_num", f"query.shape[1] = {tensors['query'].shape[1]}", head_num)
        query_ends, key_ends = (prefix_sums(given, name) for name, given in lengths.items())
        return query_ends, key_ends
    for name, tensor in tensors.items():
        arguments.check_tensor(name, tensor)
    arguments.check_scale("scale_value", scale_value)
    arguments.check_int("head_num", head_num)
    arguments.check_int("window_size", window_size)
    check_impl(impl)
    query_ends, key_ends = (prefix_sums(given, name) for name, given in lengths.items())
    numbers = {"N1": head_num, "window_size": window_size}
    check_call(tensors, query_ends, key_ends, numbers, mode=mode_in_force())
    return query_ends, key_ends


def check_call(
    tensors: Mapping[str, Tensor],
    query_ends: tuple[int, ...],
    key_ends: tuple[int, ...],
    numbers: Mapping[str, int],
    *,
    mode: str = "structural",
) -> None:
    """Check dtypes, devices, shapes, prefix sums and limits, once for each kind of call.

    `numbers` are window_size, and in a public call N1, its head_num.
    """
    ragged_contract.check_once(_check_call, tensors, {QLEN: query_ends, KVLEN: key_ends}, numbers, mode)


def _check_call(metas: tuple[tuple[str, Meta], ...], ends: Ends, numbers: Numbers, mode: str) -> None:
    call = dict(metas)
    ragged_contract.check_kinds(OP, call, mode)
    if "lse" in call:
        _check_lse(call["lse"], call["query"])
    ragged_contract.check_ends(ends)
    given = ragged_contract.quantities(call, ends, dict(numbers))
    check(OP, given, mode)
    ragged_contract.check_sizes(call, given)


def _check_lse(lse: Meta, query: Meta) -> None:
    hint = "Pass what belongs to the forward call"
    if lse.dtype != torch.float32:
        raise ArgumentTypeError("lse.dtype", "torch.float32", lse.dtype, hint)
    check_same_device("lse", lse, "query", query)
    check_rank("lse", lse, "[T1, N1]")
    if lse.shape != query.shape[:2]:
        raise ArgumentValueError("lse.shape", f"{list(query.shape[:2])}, as [T1, N1] says", list(lse.shape), hint)
