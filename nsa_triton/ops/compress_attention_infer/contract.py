"""What a legal call of compress_attention_infer is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentValueError
from nsa_triton.limits import check
from nsa_triton.ops._common import arguments, paged_contract, pages
from nsa_triton.ops._common.arguments import Meta, check_importance
from nsa_triton.ops._common.implementation import check_impl
from nsa_triton.ops._common.lengths import check_batch_lengths, host_ints, on_device
from nsa_triton.ops._common.queries import check_layout, refuse_bad_rows

OP = "nsa_compress_attention_infer"
LAYOUTS = ("TND", "BSND")
QLEN, CMP_LEN, RAW_LEN = "actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen"
SIZES = ("select_block_size", "select_block_count", "page_block_size", "compress_block_size", "compress_stride")


def check_types(**call: Any) -> None:
    """Check the arguments of a public call one by one."""
    for name in ("query", "key", "value"):
        arguments.check_tensor(name, call[name])
    for name in ("atten_mask", "block_table", "topk_mask"):
        if call[name] is not None:
            arguments.check_tensor(name, call[name])
    arguments.check_scale("scale_value", call["scale_value"])
    for name in ("head_num", "key_value_head_num", *SIZES):
        arguments.check_int(name, call[name])
    check_layout(call["layout"], LAYOUTS)
    for name in (QLEN, CMP_LEN, RAW_LEN):
        if not (on_device(call[name]) or (name != CMP_LEN and call[name] is None)):
            host_ints(call[name], name)
    check_importance(call["importance"])
    check_impl(call["impl"])
    if call["key_value_head_num"] < 1:  # what follows divides by it
        raise ArgumentValueError("key_value_head_num", "at least 1", call["key_value_head_num"])


def check_forced(num_init_blocks: Any, num_local_blocks: Any, raw_lengths: Any) -> None:
    """Check how many blocks are always chosen. Where that is given, it counts from the query token, which only raw
    lengths place."""
    given = {"num_init_blocks": num_init_blocks, "num_local_blocks": num_local_blocks}
    known = {name: number for name, number in given.items() if number is not None}
    for name, number in known.items():
        arguments.check_int(name, number)
        if number < 0:
            raise ArgumentValueError(name, "at least 0", number)
    if known and raw_lengths is None:
        hint = f"{' and '.join(known)} count blocks up to that of the query token"
        raise ArgumentValueError(RAW_LEN, "the raw tokens of each batch", None, hint)


def check_host_lengths(
    call: Mapping[str, Any], key: Tensor, block_table: Tensor | None, batch: int, block: int, stride: int
) -> None:
    """Check the lengths that are on the host. `call` has those of compressed tokens and, where query tokens see
    different ones, those of raw and of query tokens."""
    known = {name: host_ints(given, name) for name, given in call.items() if given is not None and not on_device(given)}
    for name, values in known.items():
        check_batch_lengths(values, name, batch)
    if CMP_LEN in known:
        columns = None if block_table is None else block_table.shape[1]
        pages.check_capacity(known[CMP_LEN], CMP_LEN, key.shape[1], key.shape[0], columns)
    if RAW_LEN in known:
        check_raw_lengths(known[RAW_LEN], known.get(CMP_LEN), known.get(QLEN), block, stride)


@functools.lru_cache(maxsize=64)
def check_raw_lengths(
    raw: tuple[int, ...], compressed: tuple[int, ...] | None, queries: tuple[int, ...] | None, block: int, stride: int
) -> None:
    """Raise unless compressed tokens are those of all complete windows, and query tokens are among the raw ones."""
    for index, tokens in enumerate(raw):
        windows = max(0, (tokens - block) // stride + 1)
        if compressed is not None and compressed[index] != windows:
            expected = f"{windows} at index {index}, the complete windows of the {tokens} tokens in {RAW_LEN}"
            raise ArgumentValueError(CMP_LEN, expected, compressed[index])
        if queries is not None and queries[index] > tokens:
            expected = f"at most {tokens} at index {index}, the length in {RAW_LEN}"
            raise ArgumentValueError(QLEN, expected, queries[index], f"{RAW_LEN} counts the query tokens too")


def check_call(tensors: Mapping[str, Tensor | None], numbers: Mapping[str, int], *, mode: str = "structural") -> None:
    """Check dtypes, devices, shapes and limits of canonical tensors (paged_contract.SHAPES), once per kind of call.

    `numbers` are quantities of the table of limits that the tensors do not say, or say in the words of a public call.
    """
    metas = tuple((name, Meta.of(tensor)) for name, tensor in tensors.items() if tensor is not None)
    given = tuple(numbers.items())
    sizes = (*(number for _, number in given), *(size for _, meta in metas for size in meta.shape))
    # The symbolic ints of torch.compile have no value to cache by.
    function = _check_call_once if set(map(type, sizes)) == {int} else _check_call
    function(metas, given, mode)
    for name in ("key", "value"):
        pages.check_dense(name, tensors[name])  # type: ignore[arg-type]


def _check_call(metas: tuple[tuple[str, Meta], ...], numbers: tuple[tuple[str, int], ...], mode: str) -> None:
    call = dict(metas)
    paged_contract.check_kinds(OP, call, mode)
    given = paged_contract.quantities(call, dict(numbers))
    group = given["G"]
    check(OP, {**given, "128 % G": 128 % group if group > 0 else 0}, mode)
    paged_contract.check_sizes(call, given)


_check_call_once = functools.lru_cache(maxsize=128)(_check_call)


def refuse_bad_indices(
    query: Tensor,
    key: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    raw_lengths: Tensor | None,
    block: int,
    stride: int,
) -> None:
    """Raise for pages and lengths that are wrong and that kernels do not check. Reads them back to the host."""
    n_pages, page = key.shape[:2]
    pages.refuse_missing_pages(CMP_LEN, lengths, block_table, page)
    first_token = torch.arange(block_table.shape[1], device=lengths.device) * page
    pages.refuse_bad_pages(block_table, n_pages, first_token < lengths.long()[:, None])
    if rows is not None:
        refuse_bad_rows(rows, query.shape[0])
    if raw_lengths is not None:
        each = query.shape[0] // lengths.shape[0]
        queries = [each] * lengths.shape[0] if rows is None else rows[:, 1].tolist()
        check_raw_lengths(tuple(raw_lengths.tolist()), tuple(lengths.tolist()), tuple(queries), block, stride)
