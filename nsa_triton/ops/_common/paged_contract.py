"""What the paged attention operators ask of their canonical tensors: queries [T, N1, Dk], caches [pages, page, N2, D],
and integer tensors with an entry for each batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import check
from nsa_triton.ops._common.arguments import (
    Meta,
    check_rank,
    check_same_device,
    check_same_dtype,
    check_size,
)

Metas = Mapping[str, Meta]
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
