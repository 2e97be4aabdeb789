"""What a legal call of select_attention_infer is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import check
from nsa_triton.ops._common import arguments, paged_contract, pages
from nsa_triton.ops._common.arguments import Meta, check_size
from nsa_triton.ops._common.implementation import check_impl
from nsa_triton.ops._common.indices import refuse_outside
from nsa_triton.ops._common.lengths import host_ints, on_device
from nsa_triton.ops._common.queries import check_layout, refuse_bad_rows, visible_tokens

OP = "nsa_select_attention_infer"
LAYOUTS = ("BSH", "BSND", "TND")
KVLEN, QLEN = "actual_seq_kvlen", "actual_seq_qlen"
INTEGERS = ("head_num", "key_value_head_num", "select_block_size", "select_block_count", "page_block_size")


def check_types(**call: Any) -> None:
    """Check the arguments of a public call one by one."""
    for name in ("query", "key", "value", "topk_indices"):
        arguments.check_tensor(name, call[name])
    for name in ("atten_mask", "block_table"):
        if call[name] is not None:
            arguments.check_tensor(name, call[name])
    arguments.check_scale("scale_value", call["scale_value"])
    for name in INTEGERS:
        arguments.check_int(name, call[name])
    check_layout(call["layout"], LAYOUTS)
    for name in (KVLEN, QLEN):
        if not (on_device(call[name]) or (name == QLEN and call[name] is None)):
            host_ints(call[name], name)
    if not isinstance(call["return_lse"], bool):
        raise ArgumentTypeError("return_lse", "a bool", type(call["return_lse"]).__name__)
    check_impl(call["impl"])


def packed_ids(topk_indices: Tensor, query: Tensor, layout: str) -> Tensor:
    """[T, N2, K] of the ids of any layout. [B, N2, K] will do for one query token per batch."""
    if layout != "TND" and topk_indices.dim() == 4:
        if topk_indices.shape[:2] != query.shape[:2]:
            expected = f"{list(query.shape[:2])}, the batches and query tokens of query"
            raise ArgumentValueError("topk_indices.shape[:2]", expected, list(topk_indices.shape[:2]))
        return topk_indices.flatten(0, 1)
    if topk_indices.dim() != 3 or (layout != "TND" and query.shape[1] != 1):
        one = " or, for one query token per batch, [B, N2, K]"
        expected = "[T, N2, K]" if layout == "TND" else "[B, S, N2, K]" + (one if query.shape[1] == 1 else "")
        raise ArgumentValueError("topk_indices", expected, f"shape {list(topk_indices.shape)}")
    return topk_indices


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


def check_call(
    tensors: Mapping[str, Tensor | None],
    select_block_size: int,
    integers: Mapping[str, int] | None = None,
    *,
    mode: str = "structural",
) -> None:
    """Check dtypes, devices, shapes and limits of canonical tensors (paged_contract.SHAPES), once per kind of call.

    `integers` are quantities of the table of limits: what a public call, which has no lengths yet, says in numbers.
    """
    metas = tuple((name, Meta.of(tensor)) for name, tensor in tensors.items() if tensor is not None)
    numbers = tuple((integers or {}).items())
    sizes = (select_block_size, *(size for _, meta in metas for size in meta.shape), *(n for _, n in numbers))
    # The symbolic ints of torch.compile have no value to cache by.
    function = _check_call_once if set(map(type, sizes)) == {int} else _check_call
    function(metas, select_block_size, numbers, mode)
    for name in ("key", "value"):
        pages.check_dense(name, tensors[name])  # type: ignore[arg-type]


def _check_call(
    metas: tuple[tuple[str, Meta], ...], select_block_size: int, numbers: tuple[tuple[str, int], ...], mode: str
) -> None:
    call = dict(metas)
    paged_contract.check_kinds(OP, call, mode)
    count = call["topk_indices"].shape[2]
    sizes = {"select_block_size": select_block_size, "select_block_count": count, "topk_indices.shape[-1]": count}
    given = paged_contract.quantities(call, {**sizes, **dict(numbers)})
    check(OP, {**given, "key_value_head_num": given["N2"]}, mode)
    paged_contract.check_sizes(call, given)
    check_size("topk_indices", call["topk_indices"], 0, call["query"].shape[0], "a row for each query token")
    check_size("topk_indices", call["topk_indices"], 1, given["N2"], "a list for each kv head")
    if count < 1:
        raise ArgumentValueError("select_block_count", "at least 1", count)


_check_call_once = functools.lru_cache(maxsize=128)(_check_call)


def refuse_bad_indices(
    key: Tensor, topk_indices: Tensor, block_table: Tensor, lengths: Tensor, rows: Tensor | None, block: int
) -> None:
    """Raise for ids, pages and lengths that the kernels would clamp or skip. Reads them back to the host."""
    n_pages, page = key.shape[:2]
    if rows is not None:
        refuse_bad_rows(rows, topk_indices.shape[0])
    pages.refuse_missing_pages(KVLEN, lengths, block_table, page)
    batch, visible = visible_tokens(rows, lengths, topk_indices.shape[0])
    blocks = ((visible + block - 1) // block)[:, None, None]
    hint = "-1 is an empty entry, and blocks that the query token does not see do not exist"
    refuse_outside("topk_indices", topk_indices, -1, blocks, (visible > 0)[:, None, None], hint)
    # Blocks and pages are made of sixteens: the tokens 0, 16, 32 .. of a block are in all pages that it touches.
    place = topk_indices.long()[..., None] * block + torch.arange(
        0, block, 16, device=key.device
    )  # [T, N2, K, l' / 16]
    read = torch.zeros_like(block_table, dtype=torch.bool)
    is_read = (place >= 0) & (place < visible[:, None, None, None])
    read[batch[:, None, None, None].expand_as(place)[is_read], place[is_read] // page] = True
    pages.refuse_bad_pages(block_table, n_pages, read)
