"""Prefill and decoding over a paged cache give, token by token, what one pass over each sequence gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_triton import ArgumentTypeError, ArgumentValueError, CacheFullError, NSACache, NSAConfig
from tests.implementations import each_implementation
from tests.modules.test_nsa import SEPARATE, SMALL, made, refused, tokens

every_impl = each_implementation("sliding_window_attention_infer")

WIDE = NSAConfig(20, 8, 1, 16, 32, 48, 16, 48, 4, 30, 1, 2)
FLAT = NSAConfig(20, 2, 2, 32, 16, 16, 16, 16, 5, 1, 0, 1, "cann")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}


class Growing:
    """Sequences in a cache, and what a module makes of each from its beginning."""

    def __init__(self, config, impl, longest, sequences, pages=40, device="cpu"):
        self.module = made(config, impl).to(device)
        self.cache = NSACache(config, layers=2, pages=pages, max_tokens=longest, dtype=torch.float32, device=device)
        for tensor in (self.cache.keys, self.cache.values, self.cache.compressed_keys, self.cache.compressed_values):
            tensor.fill_(torch.nan)  # what was not written must not matter
        self.hidden = {self.cache.add(): tokens(config, longest, seed=s).to(device) for s in range(sequences)}
        self.whole = {s: self.module(hidden).detach() for s, hidden in self.hidden.items()}

    @torch.no_grad()
    def extend(self, counts, layer=1, into=None):
        """Take so many tokens of each sequence, and compare."""
        begins = {s: self.cache.length(s) for s in counts}
        step = self.cache.extend(counts, into=into)
        new = torch.cat([self.hidden[s][b : b + counts[s]] for s, b in begins.items()])
        expected = torch.cat([self.whole[s][b : b + counts[s]] for s, b in begins.items()])
        torch.testing.assert_close(self.module(new, step=step, layer=layer), expected, **CLOSE)
        return step


@every_impl
@pytest.mark.parametrize("config", [SMALL, WIDE, FLAT, SEPARATE], ids=["small", "wide", "flat", "separate"])
def test_prefill_then_decode(config, impl):
    growing = Growing(config, impl, 150, 3)
    growing.extend({0: 70, 1: 5, 2: 33})
    for _ in range(20):
        growing.extend({0: 1, 1: 1, 2: 1})
    for counts in ({0: 1, 2: 3}, {1: 16, 0: 2}, {2: 1, 1: 17}, {0: 5, 1: 40, 2: 60}):
        growing.extend(counts)


@every_impl
def test_prefill_in_chunks(impl):
    growing = Growing(SMALL, impl, 150, 2)
    for counts in ({0: 50}, {0: 50, 1: 1}, {0: 49, 1: 149}, {0: 1}):
        growing.extend(counts)


@every_impl
def test_pages_that_are_used_again(impl):
    """The sequence that has them next sees nothing of the one before."""
    growing = Growing(SMALL, impl, 600, 3, pages=3)
    growing.extend({0: 600})
    growing.cache.free(0)
    growing.extend({1: 300})
    growing.extend({1: 100})
    growing.extend({2: 40})
    assert growing.cache.free_pages == 0


@every_impl
@pytest.mark.parametrize("length", [100, 256, 270, 300])
def test_forks_share_and_diverge(length, impl):
    """At 256 and 270 the next window begins in a page that is full and shared."""
    growing = Growing(SMALL, impl, 320, 1)
    cache = growing.cache
    growing.extend({0: length})
    used = cache.free_pages
    fork = cache.fork(0)
    assert cache.free_pages == used
    other = torch.cat((growing.hidden[0][:length], tokens(SMALL, 320 - length, seed=9)))
    growing.hidden[fork], growing.whole[fork] = other, growing.module(other).detach()
    for counts in ({0: 1, fork: 1}, {fork: 17}, {0: 18}, {0: 1, fork: 1}):
        growing.extend(counts)
    cache.free(0)
    growing.extend({fork: 1})
    cache.free(fork)
    assert cache.free_pages == 40


@every_impl
def test_what_was_not_accepted_is_forgotten(impl):
    growing = Growing(SMALL, impl, 300, 2)
    growing.extend({0: 250, 1: 30})
    draft = growing.hidden[0].clone()
    growing.hidden[0][252:] = torch.randn(48, SMALL.hidden_size)
    growing.whole[0] = growing.module(growing.hidden[0]).detach()
    growing.extend({0: 30})
    growing.cache.truncate(0, 252)
    growing.hidden[0] = draft
    growing.whole[0] = growing.module(draft).detach()
    for _ in range(6):
        growing.extend({0: 5, 1: 1})
    growing.cache.truncate(0, 0)
    growing.extend({0: 20})


def test_a_cache_may_be_rounded():
    """Its dtype is that of decoding; results have the dtype of the tokens."""
    module, hidden = made(SMALL, "reference"), tokens(SMALL, 60)
    cache = NSACache(SMALL, layers=1, pages=1, max_tokens=60, dtype=torch.bfloat16)
    number = cache.add()
    with torch.no_grad():
        expected = module(hidden)
        for begin, end in ((0, 50), (50, 55), (55, 56)):
            output = module(hidden[begin:end], step=cache.extend({number: end - begin}))
            assert output.dtype == torch.float32
            error = (output - expected[begin:end]).norm(dim=1) / expected[begin:end].norm(dim=1)
            assert error.median() < 10 * torch.finfo(torch.bfloat16).eps


def test_layers_are_apart():
    growing = Growing(SMALL, "reference", 40, 1)
    growing.extend({0: 30}, layer=1)
    assert growing.cache.keys[0].isnan().all()
    assert not growing.cache.keys[1, :, :30].isnan().all()


class Watching(TorchDispatchMode):
    """Notes what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_step_may_be_filled_again_in_place():
    """As a captured graph needs it: the same tensors, and nothing is read back between."""
    growing = Growing(SMALL, "reference", 120, 2)
    growing.extend({0: 30, 1: 60})
    step = growing.extend({0: 1, 1: 1})
    tensors = (step.table, step.lengths, step.windows, step.window_slots, step.slots, step.positions)
    places = [tensor.data_ptr() for tensor in tensors]
    for _ in range(5):
        assert growing.extend({0: 1, 1: 1}, into=step) is step
        now = (step.table, step.lengths, step.windows, step.window_slots, step.slots, step.positions)
        assert [tensor.data_ptr() for tensor in now] == places
    assert step.positions.tolist() == [35, 65]
    with Watching() as watching:
        growing.cache.extend({0: 1, 1: 1}, into=step)
    assert not watching.found
    for counts in ({0: 1}, {0: 2, 1: 1}, {0: 17, 1: 1}):
        length = growing.cache.length(0)
        refused(ArgumentValueError, "into", lambda counts=counts: growing.cache.extend(counts, into=step))
        assert growing.cache.length(0) == length


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on CUDA and NPU devices; there is none")
def test_a_step_is_captured_in_a_graph():
    growing = Growing(SMALL, "triton", 120, 2, device="cuda")
    growing.extend({0: 30, 1: 60})
    step = growing.extend({0: 1, 1: 1})
    hidden = torch.zeros(2, SMALL.hidden_size, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = growing.module(hidden, step=step, layer=1)
    for _ in range(20):
        places = growing.cache.length(0), growing.cache.length(1)
        growing.cache.extend({0: 1, 1: 1}, into=step)
        hidden.copy_(torch.stack([growing.hidden[s][place] for s, place in enumerate(places)]))
        graph.replay()
        expected = torch.stack([growing.whole[s][place] for s, place in enumerate(places)])
        torch.testing.assert_close(output, expected, **CLOSE)


def test_a_full_cache_raises_before_anything_is_written():
    cache = NSACache(SMALL, layers=1, pages=4, max_tokens=2000, dtype=torch.float32)
    first, second = cache.add(), cache.add()
    cache.extend({first: 256 * 3})
    contents = [t.clone() for t in (cache.keys, cache.compressed_keys)]
    with pytest.raises(CacheFullError, match=r"2 pages of 256 tokens are needed, 1 are free of 4\. Free sequences"):
        cache.extend({second: 10, first: 10})
    assert (cache.length(first), cache.length(second), cache.free_pages) == (768, 0, 1)
    assert all(map(torch.equal, contents, (cache.keys, cache.compressed_keys)))
    cache.extend({second: 256})
    with pytest.raises(CacheFullError):
        cache.extend({first: 1})
    cache.free(second)
    cache.extend({first: 1})


def test_forks_need_pages_of_their_own_when_they_grow():
    """Two forks of a page that is not full: the first copies it, the second then has it alone."""
    cache = NSACache(SMALL, layers=1, pages=2, max_tokens=256, dtype=torch.float32)
    first = cache.add()
    cache.extend({first: 10})
    second = cache.fork(first)
    assert cache.free_pages == 1
    cache.extend({first: 1, second: 1})
    assert cache.free_pages == 0
    third = cache.fork(first)
    with pytest.raises(CacheFullError):
        cache.extend({third: 1})


@pytest.mark.parametrize("seed", range(4))
def test_no_page_is_lost(seed):
    """2,500 random operations each: pages in use are those of living sequences, and all are free at the end."""
    dice = random.Random(seed)
    cache = NSACache(SMALL, layers=1, pages=30, max_tokens=2000, dtype=torch.float32)
    lengths: dict[int, int] = {}
    refusals = 0
    for _ in range(2500):
        action = dice.choice(["add", "fork", "free", "truncate", "extend", "extend", "extend"])
        some = dice.choice(sorted(lengths)) if lengths else None
        if action == "add" or some is None:
            lengths[cache.add()] = 0
        elif action == "fork":
            lengths[cache.fork(some)] = lengths[some]
        elif action == "free":
            cache.free(some)
            del lengths[some]
        elif action == "truncate":
            lengths[some] = dice.randint(0, lengths[some])
            cache.truncate(some, lengths[some])
        else:
            chosen = dice.sample(sorted(lengths), min(len(lengths), dice.randint(1, 3)))
            counts = {s: dice.choice([1, 1, 3, 40, 300]) for s in chosen}
            counts = {s: n for s, n in counts.items() if lengths[s] + n <= 2000}
            if not counts:
                continue
            try:
                cache.extend(counts)
            except CacheFullError:
                refusals += 1
            else:
                lengths |= {s: lengths[s] + n for s, n in counts.items()}
        living = [cache._sequences[s] for s in cache.sequences]
        assert {s: cache.length(s) for s in cache.sequences} == lengths
        assert all(len(s.pages) == -(-s.tokens // 256) for s in living)
        assert cache.free_pages == 30 - len({page for s in living for page in s.pages})
    assert 0 < refusals < 2000
    for sequence in cache.sequences:
        cache.free(sequence)
    assert cache.free_pages == 30
    assert cache.sequences == ()


def test_bad_calls():
    good: dict[str, Any] = {"layers": 1, "pages": 2, "max_tokens": 300}
    for name in good:
        refused(ArgumentValueError, name, lambda name=name: NSACache(SMALL, **good | {name: 0}))
        refused(ArgumentTypeError, name, lambda name=name: NSACache(SMALL, **good | {name: 2.0}))
    for size in (0, 128, 257):
        refused(ArgumentValueError, "page_size", lambda size=size: NSACache(SMALL, **good, page_size=size))
    assert NSACache(SMALL, **good, page_size=512).compressed_page_size == 32
    cache = NSACache(SMALL, **good, dtype=torch.float32)
    number = cache.add()
    refused(ArgumentValueError, "tokens", lambda: cache.extend({}))
    refused(ArgumentValueError, "sequence", lambda: cache.extend({7: 1}))
    refused(ArgumentValueError, f"tokens[{number}]", lambda: cache.extend({number: 0}))
    refused(ArgumentValueError, f"tokens[{number}]", lambda: cache.extend({number: 301}))
    half: Any = {number: 1.5}
    refused(ArgumentTypeError, f"tokens[{number}]", lambda: cache.extend(half))
    refused(ArgumentValueError, "tokens", lambda: cache.truncate(number, 1))
    for call in (cache.free, cache.fork, cache.length):
        refused(ArgumentValueError, "sequence", lambda call=call: call(5))
    step = cache.extend({number: 3})
    module = made(SMALL, "reference")
    refused(ArgumentValueError, "hidden", lambda: module(tokens(SMALL, 4), step=step))
    refused(ArgumentValueError, "cu_seqlens", lambda: module(tokens(SMALL, 3), step=step, cu_seqlens=[0, 3]))
    refused(ArgumentValueError, "layer", lambda: module(tokens(SMALL, 3), step=step, layer=1))
    refused(ArgumentValueError, "step", lambda: made(WIDE, "reference")(tokens(WIDE, 3), step=step))
