"""What a legal call of select_attention and of its gradient is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import check, mode_in_force
from nsa_triton.ops._common import arguments, ragged_contract
from nsa_triton.ops._common.arguments import Meta, check_size
from nsa_triton.ops._common.implementation import check_impl
from nsa_triton.ops._common.indices import check_index_meta, refuse_outside
from nsa_triton.ops._common.ragged_contract import Ends, Numbers, lengths_of, prefix_sums

OP = "nsa_select_attention"
QLEN, KVLEN = "actual_seq_qlen", "actual_seq_kvlen"


def checked_ends(
    tensors: Mapping[str, Any],
    *,
    atten_mask: Any,
    scale_value: Any,
    actual_seq_qlen: Any,
    actual_seq_kvlen: Any,
    impl: Any,
    **integers: Any,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check a public call, types first, and return the prefix sums of queries and of keys.

    `tensors` are those that the operator gets, and `integers` head_num, select_block_size and select_block_count.
    """
    lengths = {QLEN: actual_seq_qlen, KVLEN: actual_seq_kvlen}
    if torch.compiler.is_compiling():  # Dynamo cannot trace the checks below; the registered operators make them too
        query_ends, key_ends = (prefix_sums(given, name) for name, given in lengths.items())
        return query_ends, key_ends
    for name, tensor in tensors.items():
        arguments.check_tensor(name, tensor)
    if atten_mask is not None:
        arguments.check_tensor("atten_mask", atten_mask)
    arguments.check_scale("scale_value", scale_value)
    for name, integer in integers.items():
        arguments.check_int(name, integer)
    check_impl(impl)
    query_ends, key_ends = (prefix_sums(given, name) for name, given in lengths.items())
    numbers = {**integers, "N1": integers["head_num"]}
    check_call(tensors, query_ends, key_ends, numbers, mode=mode_in_force())
    return query_ends, key_ends


def is_causal(causal: Any, atten_mask: Tensor | None) -> bool:
    """What the forward call means: None leaves it to the mask, of which only the presence counts."""
    if causal is None:
        return atten_mask is not None
    check_causal(causal, atten_mask, "True, False or None")
    return bool(causal)


def check_causal(causal: Any, atten_mask: Tensor | None, expected: str = "True or False") -> None:
    if not isinstance(causal, bool):
        raise ArgumentTypeError("causal", expected, f"{causal!r} of type {type(causal).__name__}")
    if atten_mask is not None and not causal:
        hint = "A mask means causal attention, whatever it holds; leave it out for full attention"
        raise ArgumentValueError("causal", "True, because atten_mask is given", causal, hint)


def check_call(
    tensors: Mapping[str, Tensor],
    query_ends: tuple[int, ...],
    key_ends: tuple[int, ...],
    numbers: Mapping[str, int],
    *,
    mode: str = "structural",
) -> None:
    """Check dtypes, devices, shapes, prefix sums and limits, once for each kind of call.

    `numbers` are select_block_size, and what a public call says of the table of limits in its own words.
    """
    ends = {QLEN: query_ends, KVLEN: key_ends}
    ragged_contract.check_once(_check_call, tensors, ends, numbers, mode)


def _check_call(metas: tuple[tuple[str, Meta], ...], ends: Ends, numbers: Numbers, mode: str) -> None:
    call = dict(metas)
    ragged_contract.check_kinds(OP, call, mode)
    ids = call["topk_indices"]
    check_index_meta("topk_indices", ids, "[T1, N2, K]", "query", call["query"])
    ragged_contract.check_ends(ends)
    count = ids.shape[2]
    sizes = {"topk_indices.shape[2]": count, "select_block_count": count, **dict(numbers)}
    given = ragged_contract.quantities(call, ends, sizes)
    check(OP, given, mode)
    ragged_contract.check_sizes(call, given)
    check_size("topk_indices", ids, 0, given["T1"], "a row for each row of query")
    check_size("topk_indices", ids, 1, given["N2"], "a list for each kv head")
    check(OP, _segments(ends, given["select_block_size"], count), mode)


def _segments(ends: Ends, block: int, count: int) -> dict[str, int]:
    """What the table of limits wants to know of the segments."""
    (_, query_ends), (_, key_ends) = ends
    queries, keys = lengths_of(query_ends), lengths_of(key_ends)
    return {
        "S1": functools.reduce(torch.sym_max, queries),
        "S2": functools.reduce(torch.sym_max, keys),
        "least S2": functools.reduce(torch.sym_min, keys),
        "K * select_block_size": count * block,
        "S2 % select_block_size": functools.reduce(torch.sym_max, [length % block for length in keys]),
    }


def refuse_bad_ids(
    topk_indices: Tensor, query_ends: tuple[int, ...], key_ends: tuple[int, ...], select_block_size: int
) -> None:
    """Raise for ids that would be skipped because there is no such block. Reads them back to the host."""
    blocks = torch.zeros(len(topk_indices), dtype=torch.int64)
    first = 0
    for end, keys in zip(query_ends, lengths_of(key_ends), strict=True):
        blocks[first:end] = -(-keys // select_block_size)
        first = end
    is_query = torch.arange(len(blocks)) < first
    blocks, is_query = (of_rows[:, None, None].to(topk_indices.device) for of_rows in (blocks, is_query))
    hint = "-1 is an empty entry, and ids count the blocks of their own segment"
    refuse_outside("topk_indices", topk_indices, -1, blocks, is_query, hint)
