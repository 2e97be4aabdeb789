"""What the training attention operators ask of packed tensors, and of the prefix sums that cut them into segments."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import check
from nsa_triton.ops._common.arguments import (
    Meta,
    check_rank,
    check_same_device,
    check_same_dtype,
    check_size,
)
from nsa_triton.ops._common.lengths import check_prefix_ends, host_ints
from nsa_triton.ops._common.statistics import STATE

SHAPES = {
    "query": "[T1, N1, Dk]",
    "key": "[T2, N2, Dk]",
    "value": "[T2, N2, Dv]",
    "grad": "[T1, N1, Dv]",
    "attention_out": "[T1, N1, Dv]",
    "softmax_max": "[T1, N1, 8]",
    "softmax_sum": "[T1, N1, 8]",
}
LIKE_QUERY = ("key", "value", "grad", "attention_out")  # in their dtype
STATISTICS = ("softmax_max", "softmax_sum")

Metas = Mapping[str, Meta]
Ends = tuple[tuple[str, tuple[int, ...]], ...]  # (argument, prefix sums) of the queries, then of the keys
Numbers = tuple[tuple[str, int], ...]
Check = Callable[[tuple[tuple[str, Meta], ...], Ends, Numbers, str], None]


def prefix_sums(lengths: Any, argument: str) -> tuple[int, ...]:
    """The entries of a list of a public call. Their values are checked with the rest of the call."""
    if not torch.compiler.is_compiling():
        return host_ints(lengths, argument)
    if not isinstance(lengths, (list, tuple)):
        raise ArgumentTypeError(argument, "a list or tuple of ints under torch.compile", type(lengths).__name__)
    return tuple(lengths)


def check_once(
    check_call: Check,
    tensors: Mapping[str, Tensor | None],
    ends: Mapping[str, tuple[int, ...]],
    numbers: Mapping[str, int],
    mode: str,
) -> None:
    """Call `check_call(metas, ends, numbers, mode)`, a function of a module, once for each kind of call."""
    metas = tuple((name, Meta.of(tensor)) for name, tensor in tensors.items() if tensor is not None)
    shapes = (meta.shape for _, meta in metas)
    # The symbolic ints of torch.compile have no value to cache by.
    kinds = set(map(type, itertools.chain(numbers.values(), *ends.values(), *shapes)))
    function = _check_once if kinds == {int} else _check
    function(check_call, metas, tuple(ends.items()), tuple(numbers.items()), mode)


def _check(check_call: Check, metas: tuple[tuple[str, Meta], ...], ends: Ends, numbers: Numbers, mode: str) -> None:
    check_call(metas, ends, numbers, mode)


_check_once = functools.lru_cache(maxsize=128)(_check)


def check_kinds(op: str, call: Metas, mode: str) -> None:
    """Dtypes, devices and ranks of the tensors in SHAPES."""
    query = call["query"]
    for name in LIKE_QUERY:
        if name in call:
            check_same_dtype(name, call[name], "query", query)
    check(op, {"dtype": query.dtype}, mode)
    for name in STATISTICS:
        if name in call and call[name].dtype != torch.float32:
            hint = "Pass the statistics that the forward call returned"
            raise ArgumentTypeError(f"{name}.dtype", "torch.float32", call[name].dtype, hint)
    for name, dimensions in SHAPES.items():
        if name in call:
            check_same_device(name, call[name], "query", query)
            check_rank(name, call[name], dimensions)


def check_ends(ends: Ends) -> None:
    """Prefix sums of as many segments of queries as of keys. Any segment may be empty."""
    for argument, sums in ends:
        check_prefix_ends(sums, argument, leading_zero=True)
    (of_queries, query_ends), (of_keys, key_ends) = ends
    if len(key_ends) != len(query_ends):
        expected = f"{len(query_ends)} entries, as many as in {of_queries}"
        raise ArgumentValueError(of_keys, expected, f"{len(key_ends)} entries")


def lengths_of(ends: tuple[int, ...]) -> list[int]:
    """Tokens of each segment."""
    return [end - begin for begin, end in zip((0, *ends[:-1]), ends, strict=True)]


def quantities(call: Metas, ends: Ends, numbers: Mapping[str, int]) -> dict[str, int]:
    """What the table of limits wants to know. `numbers` are what a public call says of them in its own words."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    if key.shape[1] < 1:  # what follows divides by it
        raise ArgumentValueError("key.shape[1] (N2)", "at least 1", key.shape[1])
    given = {
        "T1": query.shape[0],
        "T2": key.shape[0],
        "N1": query.shape[1],
        "query heads": query.shape[1],
        "N2": key.shape[1],
        "value heads": value.shape[1],
        "Dk": query.shape[2],
        "key head size": key.shape[2],
        "Dv": value.shape[2],
        "B": len(ends[0][1]),
        **{f"{argument}[-1]": sums[-1] for argument, sums in ends},
        **numbers,
    }
    return {**given, "head_num": given["N1"], "G": given["N1"] // given["N2"]}


def check_sizes(call: Metas, given: Mapping[str, int]) -> None:
    """Sizes that have to agree."""
    check_size("value", call["value"], 0, given["T2"], "the tokens of key")
    for name in ("grad", "attention_out"):
        if name in call:
            _check_shape(name, call[name], (given["T1"], given["query heads"], given["Dv"]), "the shape of the output")
    for name in STATISTICS:
        if name in call:
            _check_shape(name, call[name], (given["T1"], given["query heads"], STATE), f"as {SHAPES[name]} says")


def _check_shape(name: str, meta: Meta, shape: tuple[int, ...], why: str) -> None:
    if tuple(meta.shape) != shape:
        hint = "Pass what belongs to the forward call"
        raise ArgumentValueError(f"{name}.shape", f"{list(shape)}, {why}", list(meta.shape), hint)
