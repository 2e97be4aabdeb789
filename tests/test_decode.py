"""Decoding token by token over growing paged caches gives at every step what one pass over the whole sequence gives."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from nsa_triton import nsa_compress, nsa_compress_attention_infer, nsa_compress_infer, nsa_select_attention_infer

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

N1, N2, DK, DV = 4, 2, 32, 16
WINDOW, STRIDE, BLOCK, COUNT = 32, 16, 64, 5
SCALE = DK**-0.5
PREFILL = (0, 70, 200)  # tokens that each batch has before the first step


@dataclass
class Sequences:
    """Queries, keys and values of all tokens of all batches, [B, T, N, D], and the weights of compression."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    w: torch.Tensor

    @classmethod
    def random(cls, tokens: int, device: torch.device) -> Sequences:
        generator = torch.Generator().manual_seed(0)
        batch = len(PREFILL)
        shapes = ((batch, tokens, N1, DK), (batch, tokens, N2, DK), (batch, tokens, N2, DV), (WINDOW, N2))
        q, k, v, w = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
        return cls(q, k, v, w / WINDOW)


class Caches:
    """Raw and compressed keys and values in pages that are dealt out in a random order."""

    def __init__(self, sequences: Sequences, page: int) -> None:
        self.all, self.page = sequences, page
        batch, tokens = sequences.k.shape[:2]
        device = sequences.k.device
        columns = -(-tokens // page)
        self.table = torch.randperm(batch * columns).view(batch, columns).int().to(device)
        compressed = -(-(tokens // STRIDE) // page)
        self.compressed_table = torch.randperm(batch * compressed).view(batch, compressed).int().to(device)
        garbage = math.nan  # what was not written must not matter
        self.raw = tuple(torch.full((batch * columns, page, N2, d), garbage, device=device) for d in (DK, DV))
        self.compressed = tuple(torch.full((batch * compressed, page, N2, d), garbage, device=device) for d in (DK, DV))
        self.lengths = list(PREFILL)
        for b, length in enumerate(PREFILL):
            self._write(b, 0, length)
        self._compress_prefill()

    def _write(self, b: int, begin: int, end: int) -> None:
        at = torch.arange(begin, end, device=self.table.device)
        for cache, tokens in zip(self.raw, (self.all.k, self.all.v), strict=True):
            cache[self.table[b, at // self.page].long(), at % self.page] = tokens[b, begin:end]

    def slots(self, b: int, rows: range) -> list[int]:
        return [int(self.compressed_table[b, row // self.page]) * self.page + row % self.page for row in rows]

    def _compress_prefill(self) -> None:
        for b, length in enumerate(PREFILL):
            rows = self.slots(b, range(windows(length)))
            for cache, tokens in zip(self.compressed, (self.all.k, self.all.v), strict=True):
                if rows:
                    prefix = tokens[b, :length]
                    flat = nsa_compress(prefix, self.all.w, WINDOW, STRIDE, actual_seq_len=[length], impl="triton")
                    cache.flatten(0, 1)[rows] = flat

    def append(self, count: int) -> list[int]:
        """Take `count` tokens of each batch; return how many compressed tokens each batch has."""
        for b, length in enumerate(self.lengths):
            self._write(b, length, length + count)
            self.lengths[b] = length + count
        columns = -(-count // STRIDE)
        slots = []
        for b, length in enumerate(self.lengths):
            rows = self.slots(b, range(windows(length - count), windows(length)))
            slots.append(rows + [-7] * (columns - len(rows)))
        for raw, cache in zip(self.raw, self.compressed, strict=True):
            nsa_compress_infer(
                raw, self.all.w, torch.tensor(slots, device=raw.device), WINDOW, STRIDE, self.page, new_tokens=count,
                block_table=self.table, actual_seq_len=self.lengths, cache=cache.flatten(0, 1), impl="triton",
            )  # fmt: skip
        return [windows(length) for length in self.lengths]


def windows(tokens: int) -> int:
    return max(0, (tokens - WINDOW) // STRIDE + 1)


def step(caches: Caches, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode `count` tokens of each batch: both attention outputs [B, S, N1, DV] and the ids [B, S, N2, K]."""
    compressed = caches.append(count)
    query = torch.stack([caches.all.q[b, length - count : length] for b, length in enumerate(caches.lengths)])
    several = count > 1
    sizes = (SCALE, N1, N2, BLOCK, COUNT, caches.page, WINDOW, STRIDE)
    k, v = (cache.flatten(2, 3) for cache in caches.compressed)
    first, ids = nsa_compress_attention_infer(
        query, k, v, *sizes, layout="BSND", impl="triton",
        block_table=caches.compressed_table, actual_seq_qlen=[count] * len(compressed),
        actual_cmp_seq_kvlen=compressed, atten_mask=query.new_zeros(1) if several else None,
        actual_sel_seq_kvlen=caches.lengths if several else None,
    )  # fmt: skip
    k, v = caches.raw
    second = nsa_select_attention_infer(
        query, k, v, ids, SCALE, N1, N2, BLOCK, COUNT, caches.page, layout="BSND", impl="triton",
        block_table=caches.table, actual_seq_kvlen=caches.lengths,
    )  # fmt: skip
    assert isinstance(second, torch.Tensor)
    return first, ids, second


class OneShot:
    """The same for one token, in float64, from the whole sequence at once."""

    def __init__(self, sequences: Sequences) -> None:
        self.all = Sequences(*(t.double().cpu() for t in (sequences.q, sequences.k, sequences.v, sequences.w)))
        starts = range(0, self.all.k.shape[1] - WINDOW + 1, STRIDE)
        weights = self.all.w[:, :, None]
        self.k, self.v = (
            torch.stack([(x[:, s : s + WINDOW] * weights).sum(1) for s in starts], dim=1)
            for x in (self.all.k, self.all.v)
        )

    def probabilities(self, b: int, t: int) -> torch.Tensor:
        """[N1, n] of the query token at position t, over the windows that end at or before it."""
        n = windows(t + 1)
        keys = self.k[b, :n].repeat_interleave(N1 // N2, dim=1)
        return torch.softmax(torch.einsum("hd,nhd->hn", self.all.q[b, t], keys) * SCALE, dim=1)

    def output(self, b: int, t: int) -> torch.Tensor:
        values = self.v[b, : windows(t + 1)].repeat_interleave(N1 // N2, dim=1)
        return torch.einsum("hn,nhd->hd", self.probabilities(b, t), values)

    def scores(self, b: int, t: int, blocks: int) -> torch.Tensor:
        """[N2, blocks] by the double sum of the specification."""
        group = self.probabilities(b, t).view(N2, N1 // N2, -1).sum(1)
        times = torch.zeros(group.shape[1], blocks, dtype=torch.float64)
        m, reach = BLOCK // STRIDE, WINDOW // STRIDE
        for j, a, c in itertools.product(range(blocks), range(m), range(reach)):
            x = m * (j + 1) - a - c
            if 0 <= x < len(times):
                times[x, j] += 1
        return group @ times

    def selected(self, b: int, t: int, ids: torch.Tensor) -> torch.Tensor:
        """[N1, DV] of attention over the blocks ids [N2, K]."""
        blocks = torch.arange(t + 1) // BLOCK
        chosen = (blocks[:, None] == ids[:, None, :]).any(-1).repeat_interleave(N1 // N2, dim=0)  # [N1, t + 1]
        keys, values = (x[b, : t + 1].repeat_interleave(N1 // N2, dim=1) for x in (self.all.k, self.all.v))
        scores = torch.einsum("hd,nhd->hn", self.all.q[b, t], keys) * SCALE
        terms = torch.where(chosen, scores.exp(), 0.0)
        return torch.einsum("hn,nhd->hd", terms / terms.sum(1, keepdim=True).clamp_min(1e-300), values)


def assert_ids(ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Forced blocks first, then descending by score, all distinct, -1 behind the last block."""
    blocks = scores.shape[1]
    forced = sorted({0, blocks - 2, blocks - 1} & set(range(blocks)))
    for row, of_row in zip(ids.tolist(), scores, strict=True):
        chosen = row[: min(blocks, COUNT)]
        assert row[len(chosen) :] == [-1] * (COUNT - len(chosen))
        assert chosen[: len(forced)] == forced[:COUNT]
        assert len(set(chosen)) == len(chosen)
        rest = [float(of_row[i]) for i in chosen[len(forced) :]]
        others = sorted((float(of_row[j]) for j in range(blocks) if j not in forced), reverse=True)
        assert rest == pytest.approx(others[: len(rest)], rel=1e-5, abs=1e-9)


def assert_step_is_right(caches: Caches, truth: OneShot, results: tuple[torch.Tensor, ...], count: int) -> None:
    first, ids, second = (result.cpu() for result in results)
    for b, length in enumerate(caches.lengths):
        for t in range(count):
            at = length - count + t
            n = windows(length)
            blocks = -(-((n - 1) * STRIDE + WINDOW) // BLOCK) if n else 0
            if windows(at + 1):
                torch.testing.assert_close(first[b, t].double(), truth.output(b, at), atol=2e-6, rtol=2e-5)
                assert_ids(ids[b, t], truth.scores(b, at, blocks))
            else:
                assert first[b, t].eq(0).all()
            torch.testing.assert_close(second[b, t].double(), truth.selected(b, at, ids[b, t]), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("page", "steps"), [(16, 40), (48, 50), (64, 70), (128, 90)])
def test_one_token_at_a_time(page, steps, device):
    sequences = Sequences.random(max(PREFILL) + steps, device)
    caches, truth = Caches(sequences, page), OneShot(sequences)
    for _ in range(steps):
        results = step(caches, 1)
        assert_step_is_right(caches, truth, results, 1)
    for b, length in enumerate(caches.lengths):
        for cache, whole in zip(caches.compressed, (truth.k, truth.v), strict=True):
            rows = cache.flatten(0, 1)[caches.slots(b, range(windows(length)))].cpu().double()
            torch.testing.assert_close(rows, whole[b, : windows(length)], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("page", [48, 64])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_tokens_at_a_time(page, count, device):
    """As with speculative decoding: a query token sees no window that ends behind it."""
    steps = 60 // count
    sequences = Sequences.random(max(PREFILL) + steps * count, device)
    caches, truth = Caches(sequences, page), OneShot(sequences)
    for _ in range(steps):
        assert_step_is_right(caches, truth, step(caches, count), count)
