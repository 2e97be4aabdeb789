"""The workloads run with both impls, and say of themselves what counting one by one finds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.errors import ArgumentValueError
from nsa_triton.workloads import INDICES, OPS, SHAPES, Shape, Workload, shape_named, workload

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Shape("tiny", 4, 2, 64, 32, count=4, local=100)
TOKENS, BATCH = 240, 2  # four blocks, the last one cut; the newest token completes a window
SELECTING = tuple(op for op in OPS if "select" in op)
SLIDING = tuple(op for op in OPS if "sliding" in op)
TRAINING = tuple(op for op in OPS if not op.endswith("_infer"))
HALF = 2  # bytes


def tiny(op: str, indices: str = "scores", **more: Any) -> Workload:
    return workload(op, TINY, TOKENS, batch=BATCH, indices=indices, **more)


def results(found: object) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("op", OPS)
def test_both_impls_compute_the_same(op):
    if front_end_problem() is not None:
        pytest.skip(f"no Ascend front end: {front_end_problem()}")
    work = tiny(op)
    ours, theirs = results(work.call("triton")), results(work.call("reference"))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.data_ptr() != other.data_ptr()
        assert other.float().abs().max() > 0
        if other.dtype != torch.int32:  # ids of equal scores may differ
            torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


# ---- counts, one by one ----


def ids_of(work: Workload) -> torch.Tensor:
    """[B, S, N2, K]"""
    return work.inputs["ids"].view(BATCH, -1, TINY.kv_heads, TINY.count)


def query_tokens(op: str) -> range:
    return range(TOKENS) if op in TRAINING else range(TOKENS - 1, TOKENS)


def window_ends() -> list[int]:
    return [begin + TINY.window - 1 for begin in range(0, TOKENS - TINY.window + 1, TINY.stride)]


def keys_of(work: Workload, sequence: int, head: int, place: int, token: int) -> list[int]:
    """What a query token sees: tokens of its blocks or of its window, or compressed tokens."""
    if work.op in SLIDING:
        return [p for p in range(TOKENS) if token - TINY.local < p <= token]
    if work.op not in SELECTING:
        return [i for i, end in enumerate(window_ends()) if end <= token]
    blocks = [block for block in ids_of(work)[sequence, place, head].tolist() if block >= 0]
    size = TINY.block
    return [p for block in blocks for p in range(block * size, min((block + 1) * size, TOKENS)) if p <= token]


def seen(work: Workload) -> Iterator[tuple[int, int, int, int]]:
    """Sequence, kv head, query token and key of each pair that the result depends on."""
    for sequence in range(BATCH):
        for head in range(TINY.kv_heads):
            for place, token in enumerate(query_tokens(work.op)):
                for key in keys_of(work, sequence, head, place, token):
                    yield sequence, head, token, key


def counted_attention(work: Workload) -> tuple[int, int]:
    pairs = list(seen(work))
    group, sizes = TINY.heads // TINY.kv_heads, TINY.key_dim + TINY.value_dim
    is_gradient, trains = work.op.endswith("_grad"), work.op in TRAINING
    each = 3 * TINY.key_dim + 2 * TINY.value_dim if is_gradient else sizes
    keys = len({(sequence, head, key) for sequence, head, _, key in pairs}) * sizes
    rows = BATCH * len(query_tokens(work.op))
    queries, outputs = rows * TINY.heads * TINY.key_dim, rows * TINY.heads * TINY.value_dim
    has_ids = work.op in SELECTING or not (is_gradient or work.op in SLIDING)
    ids = 4 * rows * TINY.kv_heads * TINY.count if has_ids else 0
    statistics = (1 if work.op in SLIDING else 2 * 8) * 4 * rows * TINY.heads if trains else 0
    count = queries + keys + outputs
    if is_gradient:
        raw = work.op in SELECTING + SLIDING
        all_keys = BATCH * (TOKENS if raw else len(window_ends())) * TINY.kv_heads
        count += outputs + queries + all_keys * sizes  # grad; then the gradients
    return len(pairs) * group * 2 * each, count * HALF + statistics + ids


def counted_compression(work: Workload) -> tuple[int, int]:
    begins = [begin for begin in range(TOKENS) if begin + TINY.window <= TOKENS and begin % TINY.stride == 0]
    if work.op.endswith("_infer"):
        begins = [begin for begin in begins if begin + TINY.window == TOKENS]
    covered = {begin + i for begin in begins for i in range(TINY.window)}
    of_token = BATCH * TINY.kv_heads * TINY.key_dim
    weight, products = TINY.window * TINY.kv_heads, len(begins) * TINY.window * of_token
    count = (len(covered) + len(begins)) * of_token + weight
    if not work.op.endswith("_grad"):
        return 2 * products, count * HALF
    return 2 * 2 * products, (count + TOKENS * of_token + weight) * HALF


def counted_sum(work: Workload) -> tuple[int, int]:
    rows = BATCH * TOKENS * TINY.heads
    elements, gates = rows * TINY.value_dim, rows * 3
    if not work.op.endswith("_grad"):
        return (3 + 2) * elements, (3 * elements + gates + elements) * HALF
    inputs, gradients = 4 * elements + gates, 3 * elements + gates
    return 3 * (1 + 2) * elements, (inputs + gradients) * HALF


@pytest.mark.parametrize(
    ("op", "indices"), [(op, indices) for op in OPS for indices in (INDICES if op in SELECTING else ("scores",))]
)
def test_flops_and_bytes_are_those_counted_one_by_one(op, indices):
    work = tiny(op, indices, filled=False)
    assert (work.flops, work.bytes) == counter_of(op)(work)


def counter_of(op: str) -> Callable[[Workload], tuple[int, int]]:
    if "attention" in op:
        return counted_attention
    return counted_sum if "combine" in op else counted_compression


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("op", SELECTING)
def test_live_blocks_are_those_with_a_visible_token(op, indices):
    work = tiny(op, indices, filled=False)
    live = {(sequence, head, token, key // TINY.block) for sequence, head, token, key in seen(work)}
    assert work.live_blocks == pytest.approx(len(live) / (BATCH * TINY.kv_heads * len(query_tokens(op))))


def test_nothing_is_selected_elsewhere():
    assert all(tiny(op, filled=False).live_blocks is None for op in OPS if op not in SELECTING)


# ---- ids ----


@pytest.mark.parametrize("tokens", [64, 1000, 4096])
@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("op", ["nsa_select_attention", "nsa_select_attention_infer"])
def test_ids_are_different_blocks_of_the_past(op, indices, tokens):
    work = workload(op, SHAPES["paper"], tokens, batch=1, indices=indices, filled=False)
    ids = work.inputs["ids"].view(-1, 4, 16).long()
    own = torch.arange(tokens - len(ids), tokens).view(-1, 1, 1) // 64
    assert ids.dtype == torch.int64
    assert work.inputs["ids"].dtype == torch.int32
    assert bool(((ids <= own) & (ids >= -1)).all())
    ordered = ids.sort(-1).values
    assert bool(((ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] < 0)).all())
    expected = torch.minimum(own + 1, torch.tensor(16)).expand(-1, 4, 1)
    assert torch.equal((ids >= 0).sum(-1, keepdim=True), expected), "as many as there are"


def test_each_distribution_is_what_it_says():
    ids = {
        indices: workload("nsa_select_attention", SHAPES["paper"], 8192, indices=indices, filled=False).inputs["ids"]
        for indices in INDICES
    }
    token, own = 8000, 8000 // 64
    assert ids["local"][token, 2].tolist() == list(range(own, own - 16, -1))
    scored = ids["scores"][token, 2].tolist()
    assert scored[:3] == [0, own - 1, own]
    assert torch.equal(ids["scores"][8000:8008], ids["scores"][8000].expand(8, -1, -1))
    assert not torch.equal(ids["random"][8000], ids["random"][8001])
    assert 0.4 < ids["random"][token:].float().mean() / own < 0.6


def test_seeds_change_values_and_ids():
    one, same, other = (tiny("nsa_select_attention", "random", seed=seed).inputs for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


# ---- what does not exist ----


@pytest.mark.parametrize(
    ("bad", "valid"),
    [
        ({"op": "nsa_sort"}, OPS),
        ({"indices": "uniform"}, INDICES),
        ({"tokens": 31}, ("at least 32",)),
        ({"batch": 0}, ("at least 1",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_requests_name_the_valid_ones(bad, valid):
    request = {"op": "nsa_compress", "tokens": 64, "indices": "local", "batch": 1, **bad}
    with pytest.raises(ArgumentValueError, match=re.escape(next(iter(bad)))) as error:
        workload(request.pop("op"), TINY, request.pop("tokens"), **request)
    assert all(name in str(error.value) for name in valid)


def test_an_unknown_shape_names_the_valid_ones():
    assert shape_named("paper") == Shape("paper", 64, 4, 192, 128)
    with pytest.raises(ArgumentValueError, match="gqa-d128-g1, gqa-d128-g4, gqa-d128-g16"):
        shape_named("papr")


def test_shapes_of_grouped_queries():
    for name, shape in SHAPES.items():
        assert shape.name == name
        if name != "paper":
            assert name == f"gqa-d{shape.key_dim}-g{shape.heads // shape.kv_heads}"
