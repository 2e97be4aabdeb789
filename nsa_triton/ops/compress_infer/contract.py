"""What a legal call of compress_infer is."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentValueError
from nsa_triton.limits import check, mode_in_force
from nsa_triton.ops._common import arguments
from nsa_triton.ops._common.arguments import Meta
from nsa_triton.ops._common.implementation import check_impl
from nsa_triton.ops._common.indices import check_index_meta, refuse_outside, refuse_repeated
from nsa_triton.ops._common.lengths import batch_lengths, host_ints, on_device
from nsa_triton.ops._common.pages import check_dense, refuse_bad_pages, refuse_missing_pages

OP = "nsa_compress_infer"
LENGTHS = "actual_seq_len"


class Metas(NamedTuple):
    """What checks look at of the tensors of a call."""

    input: Meta
    weight: Meta
    slots: Meta
    lengths: Meta
    cache: Meta
    table: Meta | None


def check_call(
    tensors: dict[str, Any], numbers: dict[str, Any], block_table: Any, actual_seq_len: Any, impl: Any
) -> Tensor:
    """Check a public call, types first, and return its lengths as a tensor on the device.

    `tensors` are input, weight, slot_mapping and cache; `numbers` are the integers, by name.
    """
    input = tensors["input"]
    if torch.compiler.is_compiling():  # Dynamo cannot trace the checks below; the registered operator makes them too
        return batch_lengths(actual_seq_len, LENGTHS, tensors["slot_mapping"].shape[0], input.device)
    for name, tensor in (tensors if block_table is None else {**tensors, "block_table": block_table}).items():
        arguments.check_tensor(name, tensor)
    for name, number in numbers.items():
        arguments.check_int(name, number)
    check_impl(impl)
    total = 0
    if on_device(actual_seq_len):
        lengths = batch_lengths(actual_seq_len, LENGTHS, (*actual_seq_len.shape, 1)[0], input.device)
    else:
        values = host_ints(actual_seq_len, LENGTHS)
        lengths, total = batch_lengths(values, LENGTHS, len(values), input.device), sum(values)
    check_metas(**tensors, block_table=block_table, lengths=lengths, **numbers, mode=mode_in_force())
    if block_table is None and total > input.shape[0]:
        expected = f"at most {input.shape[0]}, the packed tokens of input"
        raise ArgumentValueError(f"sum({LENGTHS})", expected, total, "They are lengths, not prefix sums")
    return lengths


def check_metas(
    input: Tensor,
    weight: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    cache: Tensor,
    compress_block_size: int,
    compress_stride: int,
    page_block_size: int,
    new_tokens: int,
    *,
    mode: str = "structural",
) -> None:
    """Check all that needs no element of a tensor, once for each kind of call."""
    table = None if block_table is None else Meta.of(block_table)
    slots, of_lengths = Meta.of(slot_mapping), Meta.of(lengths)
    metas = Metas(Meta.of(input), Meta.of(weight), slots, of_lengths, Meta.of(cache), table)
    sizes = [size for meta in metas if meta is not None for size in meta.shape]
    # The symbolic ints of torch.compile have no value to cache by.
    function = _check_metas_once if set(map(type, sizes)) <= {int} else _check_metas
    function(metas, compress_block_size, compress_stride, page_block_size, new_tokens, mode)
    for name, tensor in (("input", input), ("cache", cache)):
        check_dense(name, tensor)


def _check_metas(metas: Metas, block_size: int, stride: int, page: int, new_tokens: int, mode: str) -> None:
    input, weight, slots, lengths, cache, table = metas
    for name, meta in (("weight", weight), ("cache", cache)):
        arguments.check_same_dtype(name, meta, "input", input)
    check(OP, {"dtype": input.dtype}, mode)
    for name, meta in (("weight", weight), ("cache", cache)):
        arguments.check_same_device(name, meta, "input", input)
    _check_input(input, table)
    arguments.check_rank("weight", weight, "[compress_block_size, N]")
    arguments.check_rank("cache", cache, "[rows, N, D]")
    check_index_meta(LENGTHS, lengths, "[B]", "input", input)
    given = {
        "compress_block_size": block_size,
        "compress_stride": stride,
        "page_block_size": page,
        "B": lengths.shape[0],
        "N": input.shape[-2],
        "D": input.shape[-1],
        "new_tokens": new_tokens,
        "weight.shape[0]": weight.shape[0],
        "weight.shape[1]": weight.shape[1],
        "cache.shape[1]": cache.shape[1],
        "cache.shape[2]": cache.shape[2],
    }
    check(OP, given, mode)
    _check_slots(slots, input, lengths.shape[0], -(-new_tokens // stride))
    if table is not None:
        _check_table(table, input, lengths.shape[0], page)


_check_metas_once = functools.lru_cache(maxsize=128)(_check_metas)


def _check_input(input: Meta, table: Meta | None) -> None:
    if table is not None:
        if len(input.shape) != 4:
            expected = "4 dimensions [pages, page, N, D] in a call with block_table"
            hint = "Packed tokens [T, N, D] go without one"
            raise ArgumentValueError("input", expected, f"shape {list(input.shape)}", hint)
    elif len(input.shape) == 4:
        hint = "Pass block_table, or packed tokens [T, N, D]"
        raise ArgumentValueError("block_table", "a tensor [B, max_blocks] for input in pages", "None", hint)
    else:
        arguments.check_rank("input", input, "[T, N, D]")


def _check_slots(slots: Meta, input: Meta, batch: int, windows: int) -> None:
    flat = windows == 1 and len(slots.shape) == 1
    check_index_meta("slot_mapping", slots, "[B]" if flat else "[B, W]", "input", input)
    if tuple(slots.shape) != ((batch,) if flat else (batch, windows)):
        expected = f"{[batch, windows]}, the batches of actual_seq_len and the windows that new_tokens may complete"
        raise ArgumentValueError("slot_mapping.shape", expected, list(slots.shape))


def _check_table(table: Meta, input: Meta, batch: int, page: int) -> None:
    check_index_meta("block_table", table, "[B, max_blocks]", "input", input)
    if table.shape[0] != batch:
        raise ArgumentValueError("block_table.shape[0]", f"{batch}, the batches of actual_seq_len", table.shape[0])
    if table.shape[1] < 1:
        raise ArgumentValueError("block_table.shape[1]", "at least one page per batch", table.shape[1])
    if input.shape[0] < 1:
        raise ArgumentValueError("input.shape[0]", "at least one page", input.shape[0])
    if input.shape[1] != page:
        raise ArgumentValueError("page_block_size", f"{input.shape[1]}, the tokens per page of input", page)


def check_indices(
    input: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor | None,
    lengths: Tensor,
    cache: Tensor,
    block_size: int,
    stride: int,
    new_tokens: int,
) -> None:
    """Check every length, page id and slot that the kernel will read. Reads tensors back to the host."""
    lengths = lengths.long()
    first, count = _new_windows(lengths, block_size, stride, new_tokens)
    emits = count > 0
    if block_table is None:
        room = input.shape[0] - (lengths.cumsum(0) - lengths)
        refuse_outside(LENGTHS, lengths, 0, room + 1, torch.ones_like(emits), "The batches are packed in input")
    else:
        page = input.shape[1]
        refuse_missing_pages(LENGTHS, lengths, block_table, page, emits | (lengths < 0))
        columns = torch.arange(block_table.shape[1], device=lengths.device)
        begin, end = first * stride, (first + count - 1) * stride + block_size
        inside = (columns >= (begin // page)[:, None]) & (columns <= ((end - 1) // page)[:, None])
        refuse_bad_pages(block_table, input.shape[0], inside & emits[:, None])
    windows = torch.arange(-(-new_tokens // stride), device=lengths.device)
    used = (windows < count[:, None]).reshape(slot_mapping.shape) & (slot_mapping >= 0)  # negative slots are skipped
    refuse_outside("slot_mapping", slot_mapping, 0, cache.shape[0], used, f"cache has {cache.shape[0]} rows")
    refuse_repeated("slot_mapping", slot_mapping, used, "Each new window needs a row of its own")


def _new_windows(lengths: Tensor, block_size: int, stride: int, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Per batch, the number of the first new window, counted from the start of the sequence, and how many there are."""

    def completed(tokens: Tensor) -> Tensor:
        return (tokens - (block_size - stride)).clamp(min=0) // stride

    first = completed(lengths - new_tokens)
    return first, completed(lengths) - first
