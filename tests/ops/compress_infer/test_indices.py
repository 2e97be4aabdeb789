"""NSA_TRITON_CHECK_INDICES=1: bad lengths, page ids and slots are errors with a place, but only where they are read."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.errors import ArgumentValueError
from nsa_triton.ops.compress_infer import nsa_compress_infer
from tests.ops.compress_infer.cases import make

LENGTHS = [48, 43, 80, 16]  # batches 0 and 2 complete a window


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    monkeypatch.setenv("NSA_TRITON_CHECK_INDICES", "1")


def legal(new_tokens=1, page=16):
    call = make(LENGTHS, page=page, new_tokens=new_tokens, block=32, seed=1)
    slots = call.slots.clone()
    return call._replace(slots=slots.where((slots < 0) | (slots >= call.cache.shape[0]), slots))


def refused(call, **changes):
    before = call.cache.clone()
    with pytest.raises(ArgumentValueError) as caught:
        nsa_compress_infer(**call.arguments(impl="reference", **changes))
    assert torch.equal(call.cache, before)
    return str(caught.value)


def with_slots(call, *places):
    """The slots of a legal call are its own, 0, 1, 2 and so on; garbage stands where nothing is read."""
    slots = torch.full_like(call.slots, 2**31 - 1)
    for row, place in enumerate(places):
        slots[place] = row
    return call._replace(slots=slots)


ONE = [(0, 0), (2, 0)]
TWO = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]  # the windows that 20 new tokens complete


@pytest.mark.parametrize(("new_tokens", "places"), [(1, ONE), (20, TWO)])
def test_garbage_that_is_not_read_is_no_error(new_tokens, places):
    call = with_slots(legal(new_tokens), *places)
    before = call.cache.clone()
    nsa_compress_infer(**call.arguments(impl="reference"))
    assert ((call.cache != before).flatten(1).any(1).nonzero().flatten().tolist()) == list(range(len(places)))


def test_a_bad_page_is_named_where_it_is_read():
    call = with_slots(legal(), *ONE)
    pages = call.input.shape[0]
    for bad in (-1, pages, 2**31 - 1):
        for column in (3, 4):  # tokens 48 to 79
            table = call.table.clone()
            table[2, column] = bad
            message = refused(call, block_table=table)
            assert message.startswith(f"block_table[2, {column}]: expected an index from 0 to {pages - 1}, got {bad}")
    table = call.table.clone()
    table[2, :3] = -1
    nsa_compress_infer(**call.arguments(impl="reference", block_table=table))


def test_pages_of_every_new_window_are_checked():
    call = with_slots(legal(20), *TWO)
    table = call.table.clone()
    table[2, 2] = -7  # tokens 32 to 47, of the older window
    assert refused(call, block_table=table).startswith("block_table[2, 2]: ")


def test_a_slot_beyond_the_cache_is_named_and_a_negative_one_is_skipped():
    call = with_slots(legal(), *ONE)
    rows = call.cache.shape[0]
    call.slots[2, 0] = rows
    assert refused(call).startswith(f"slot_mapping[2, 0]: expected an index from 0 to {rows - 1}, got {rows}. ")
    flat = refused(call, slot_mapping=call.slots[:, 0])
    assert flat.startswith("slot_mapping[2]: ")
    call.slots[:, 0] = -3
    before = call.cache.clone()
    assert torch.equal(nsa_compress_infer(**call.arguments(impl="reference")), before)


def test_a_slot_that_is_used_twice_is_named():
    call = with_slots(legal(20), *TWO)
    call.slots[2, 0] = 1
    assert refused(call).startswith("slot_mapping[2, 0]: expected no index twice, got 1. ")


def test_a_length_beyond_the_block_table_is_named_where_pages_are_read():
    call = with_slots(legal(), *ONE)
    message = refused(call, actual_seq_len=[48, 43, 96, 16])
    assert message.startswith("actual_seq_len[2]: expected an index from 0 to 80, got 96. ")
    nsa_compress_infer(**call.arguments(impl="reference", actual_seq_len=[48, 43, 97, 16]))  # completes no window


def test_packed_lengths_fit_the_input():
    call = with_slots(legal(page=None), *ONE)
    nsa_compress_infer(**call.arguments(impl="reference"))
    for lengths, place in (([48, 43, 112, 16], 2), ([-1, 43, 80, 16], 0), ([10**6] * 4, 0)):
        arguments = (call.slots, None, torch.tensor(lengths), call.cache, 32, 16, 16, 1, "reference")
        with pytest.raises(ArgumentValueError, match=rf"actual_seq_len\[{place}\]: .* got {lengths[place]}\. "):
            torch.ops.nsa_triton.compress_infer(call.input, call.weight, *arguments)


def test_compiled_graphs_check_too():
    call = with_slots(legal(), *ONE)

    def step(call_slots, cache):
        return nsa_compress_infer(**call.arguments(slot_mapping=call_slots, cache=cache, impl="reference"))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    compiled(call.slots, call.cache)
    bad = call.slots.clone()
    bad[0, 0] = 10**6
    with pytest.raises(RuntimeError, match=r"slot_mapping\[0, 0\]"):
        compiled(bad, call.cache)
