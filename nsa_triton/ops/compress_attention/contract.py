"""What a legal call of compress_attention is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import check
from nsa_triton.ops._common import arguments, ragged_contract
from nsa_triton.ops._common.arguments import Meta
from nsa_triton.ops._common.implementation import check_impl
from nsa_triton.ops._common.lengths import host_ints
from nsa_triton.ops._common.ragged_contract import Ends, Numbers

OP = "nsa_compress_attention"
QLEN, CMP_LEN, SEL_LEN = "actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen"
TENSORS = ("grad", "query", "key", "value", "attention_out", "softmax_max", "softmax_sum")
MASKS = ("atten_mask", "topk_mask")
FORCED = ("num_init_blocks", "num_local_blocks")
SIZES = ("compress_block_size", "compress_stride", "select_block_size", "select_block_count")
NUMBERS = (*SIZES, *FORCED, "causal")  # of the operators


def check_types(**call: Any) -> None:
    """Check the arguments of a public call, of either function, one by one."""
    for name in TENSORS:
        if name in call:
            arguments.check_tensor(name, call[name])
    for name in MASKS:
        if call.get(name) is not None:
            arguments.check_tensor(name, call[name])
    arguments.check_scale("scale_value", call["scale_value"])
    for name in ("head_num", *SIZES, *FORCED):
        if name in call:
            arguments.check_int(name, call[name])
    for name in (QLEN, CMP_LEN):
        host_ints(call[name], name)
    if call.get(SEL_LEN) is not None:
        host_ints(call[SEL_LEN], SEL_LEN)
    arguments.check_bool("causal", call["causal"])
    if "importance" in call:
        arguments.check_importance(call["importance"])
    check_impl(call["impl"])


def check_block_lengths(lengths: Any, batch: int, mode: str) -> None:
    """CANN wants to have the prefix sums of selection blocks, and does not use them."""
    if mode != "documented":
        return
    source = "(documented limit of CANN)"
    if lengths is None:
        raise ArgumentTypeError(SEL_LEN, f"a list of ints {source}", "None")
    if len(host_ints(lengths, SEL_LEN)) != batch:
        expected = f"{batch} entries, as many as in {QLEN} {source}"
        raise ArgumentValueError(SEL_LEN, expected, f"{len(host_ints(lengths, SEL_LEN))} entries")


def check_call(
    tensors: Mapping[str, Tensor | None],
    query_ends: tuple[int, ...],
    key_ends: tuple[int, ...],
    numbers: Mapping[str, int],
    *,
    mode: str = "structural",
) -> None:
    """Check dtypes, devices, shapes, lengths and limits, once for each kind of call.

    `numbers` are those of NUMBERS that the call has, as ints, and in a public call N1, its head_num.
    """
    ragged_contract.check_once(_check_call, tensors, {QLEN: query_ends, CMP_LEN: key_ends}, numbers, mode)


def _check_call(metas: tuple[tuple[str, Meta], ...], ends: Ends, numbers: Numbers, mode: str) -> None:
    call, given = dict(metas), dict(numbers)
    ragged_contract.check_kinds(OP, call, mode)
    for name in MASKS:
        if name in call:
            _check_mask(name, call[name], call["query"])
    ragged_contract.check_ends(ends)
    given = ragged_contract.quantities(call, ends, given)
    group = given["G"]
    longest_query, longest_key = (_most(ragged_contract.lengths_of(sums)) for _, sums in ends)
    known = {**given, "128 % G": 128 % group if group > 0 else 0, "S2": longest_key}
    check(OP, known, mode)
    if "select_block_size" in given:
        strides = given["select_block_size"] // given["compress_stride"]
        blocks = [-(-length // strides) for length in ragged_contract.lengths_of(ends[1][1])]
        check(OP, {**known, "fewest blocks": -_most([-count for count in blocks])}, mode)
        if "topk_mask" in call:
            _check_extent("topk_mask", call["topk_mask"], longest_query, _most(blocks), "blocks of a segment")
    if "atten_mask" in call:
        _check_extent("atten_mask", call["atten_mask"], longest_query, longest_key, "compressed tokens of a segment")
    ragged_contract.check_sizes(call, given)
    _check_conflicts(call, given)


def _most(numbers: list[int]) -> int:
    """The largest; symbolic ints of torch.compile stay symbolic."""
    return functools.reduce(torch.sym_max, numbers)


def _check_mask(name: str, meta: Meta, query: Meta) -> None:
    if meta.dtype not in (torch.bool, torch.uint8):
        raise ArgumentTypeError(f"{name}.dtype", "torch.bool or torch.uint8", meta.dtype, "Call .bool()")
    arguments.check_same_device(name, meta, "query", query)
    arguments.check_rank(name, meta, "[query tokens, keys]" if name == "atten_mask" else "[query tokens, blocks]")


def _check_extent(name: str, meta: Meta, rows: int, columns: int, what: str) -> None:
    """One mask serves all segments: it must reach as far as the longest."""
    for dimension, (least, things) in enumerate(((rows, "query tokens of a segment"), (columns, what))):
        if meta.shape[dimension] < least:
            expected = f"at least {least}, the most {things}"
            raise ArgumentValueError(f"{name}.shape[{dimension}]", expected, meta.shape[dimension])


def _check_conflicts(call: Mapping[str, Meta], given: Mapping[str, int]) -> None:
    if given["causal"] and "atten_mask" in call:
        hint = "Put what is not to be seen into the mask, or leave it out"
        raise ArgumentValueError("causal", "False where atten_mask is given", True, hint)
    for name in FORCED:
        if given.get(name, 0) and "topk_mask" in call:
            hint = "Put the blocks into the mask, or leave it out"
            raise ArgumentValueError(name, "0 where topk_mask is given", given[name], hint)


def check_head_num(head_num: int, query: Tensor) -> None:
    """Of a call under torch.compile: the operator does not see head_num."""
    if head_num != query.shape[1]:
        raise ArgumentValueError("head_num", f"query.shape[1] = {query.shape[1]}", head_num)
