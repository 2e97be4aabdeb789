"""What the paged attention operators ask of their canonical tensors: queries [T, N1, Dk], caches [pages, page, N2, D],
and integer tensors with an entry for each batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import check
from nsa_triton.ops._common import pages
from nsa_triton.ops._common.arguments import (
    Meta,
    check_bool,
    check_int,
    check_rank,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_size,
    check_tensor,
)
from nsa_triton.ops._common.implementation import check_impl
from nsa_triton.ops._common.lengths import host_ints, on_device
from nsa_triton.ops._common.queries import check_layout

Metas = Mapping[str, Meta]
LAYOUTS = ("BSH", "BSND", "TND")
KVLEN, QLEN = "actual_seq_kvlen", "actual_seq_qlen"
SHAPES = {
    "query": "[T, N1, Dk]",
    "key": "[pages, page, N2, Dk]",
    "value": "[pages, page, N2, Dv]",
    "topk_indices": "[T, N2, K]",
    "block_table": "[B, max_blocks]",
    "lengths": "[B]",
    "rows": "[B, 2]",
    "raw_lengths": "[B]",
}
OF_BATCHES = ("block_table", "lengths", "rows", "raw_lengths")


def check_types(
    call: Mapping[str, Any], *, tensors: tuple[str, ...], optional: tuple[str, ...], ints: tuple[str, ...]
) -> None:
    """Check the arguments of a public call of attention over a paged cache one by one."""
    for name in (*tensors, *(name for name in optional if call[name] is not None)):
        check_tensor(name, call[name])
    check_scale("scale_value", call["scale_value"])
    for name in ints:
        check_int(name, call[name])
    check_layout(call["layout"], LAYOUTS)
    for name in (KVLEN, QLEN):
        if not (on_device(call[name]) or (name == QLEN and call[name] is None)):
            host_ints(call[name], name)
    check_bool("return_lse", call["return_lse"])
    check_impl(call["impl"])


def check_host_lengths(kvlen: Any, qlen: Any, key: Tensor, block_table: Tensor | None) -> None:
    """Check the lengths that are on the host; how many they are is checked elsewhere."""
    if on_device(kvlen):
        return
    tokens = host_ints(kvlen, KVLEN)
    columns = None if block_table is None else block_table.shape[1]
    pages.check_capacity(tokens, KVLEN, key.shape[1], key.shape[0], columns)
    if qlen is None or on_device(qlen):
        return
    for index, (queries, cached) in enumerate(zip(host_ints(qlen, QLEN), tokens, strict=True)):
        if queries > cached:
            expected = f"at most {cached} at index {index}, the length in {KVLEN}"
            raise ArgumentValueError(QLEN, expected, queries, f"{KVLEN} counts the query tokens too")


class CallCheck:
    """A check of canonical tensors (SHAPES), made once per kind of call.

    `check` gets what there is to know of the tensors, quantities of the table of limits that these do not say, or say
    in the words of a public call, and the mode.
    """

    def __init__(self, check: Callable[[dict[str, Meta], dict[str, int], str], None]) -> None:
        self._check = check
        self._check_once = functools.lru_cache(maxsize=128)(self._check_kind)

    def _check_kind(self, metas: tuple[tuple[str, Meta], ...], numbers: tuple[tuple[str, int], ...], mode: str) -> None:
        self._check(dict(metas), dict(numbers), mode)

    def __call__(
        self, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, int], *, mode: str = "structural"
    ) -> None:
        metas = tuple((name, Meta.of(tensor)) for name, tensor in tensors.items() if tensor is not None)
        given = tuple(numbers.items())
        sizes = (*(number for _, number in given), *(size for _, meta in metas for size in meta.shape))
        # The symbolic ints of torch.compile have no value to cache by.
        function = self._check_once if set(map(type, sizes)) == {int} else self._check_kind
        function(metas, given, mode)
        for name in ("key", "value"):
            pages.check_dense(name, tensors[name])  # type: ignore[arg-type]


def check_kinds(op: str, call: Metas, mode: str) -> None:
    """Dtypes, devices and ranks."""
    query = call["query"]
    for name in ("key", "value"):
        check_same_dtype(name, call[name], "query", query)
    check(op, {"dtype": query.dtype}, mode)
    for name, meta in call.items():
        if name not in ("query", "key", "value") and meta.dtype != torch.int32:
            raise ArgumentTypeError(f"{name}.dtype", "torch.int32", meta.dtype, "Call .int()")
        check_same_device(name, meta, "query", query)
        check_rank(name, meta, SHAPES[name])


def quantities(call: Metas, numbers: Mapping[str, int]) -> dict[str, int]:
    """What the table of limits wants to know. `numbers` are what a public call says of them in its own words."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    given = {
        "page_block_size": key.shape[1],
        "N1": query.shape[1],
        "query heads": query.shape[1],
        "N2": key.shape[2],
        "key heads": key.shape[2],
        "value heads": value.shape[2],
        "key head size": key.shape[3],
        "Dk": query.shape[2],
        "Dv": value.shape[3],
        **({"B": call["block_table"].shape[0]} if "block_table" in call else {}),
        **numbers,
    }
    for argument, name in (("batches (B)", "B"), ("key_value_head_num", "N2")):  # what follows divides by them
        if given[name] < 1:
            raise ArgumentValueError(argument, "at least 1", given[name])
    if "lengths" in call and "rows" not in call:
        if query.shape[0] % given["B"]:
            raise ArgumentValueError("query.shape[0]", f"a multiple of B = {given['B']}", query.shape[0])
        given.setdefault("S", query.shape[0] // given["B"])
    return {**given, "head_num": given["N1"], "G": given["N1"] // given["N2"]}


def check_sizes(call: Metas, given: Mapping[str, int]) -> None:
    """Sizes that have to agree, and those that may not be 0."""
    for name in ("key", "value"):
        check_size(name, call[name], 1, given["page_block_size"], "page_block_size")
    check_size("value", call["value"], 0, call["key"].shape[0], "the pages of key")
    for name in OF_BATCHES:
        if name in call:
            check_size(name, call[name], 0, given["B"], "one for each batch (B)")
    if "rows" in call:
        check_size("rows", call["rows"], 1, 2, "the first row and the query tokens of a batch")
    for name, dimension in (("key", 0), ("block_table", 1)):
        if name in call and call[name].shape[dimension] < 1:
            raise ArgumentValueError(f"{name}.shape[{dimension}]", "at least 1", call[name].shape[dimension])
