"""A small transformer whose only attention is that of this package learns to look things up, by the blocks that it
selects; and the kernels give its training the same losses as the reference does."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nsa_triton import nsa_compress, nsa_compress_attention, nsa_select_attention
from tests.implementations import kernel_problem

PROBLEM = kernel_problem("select_attention")
# With one thread, sums have the same order on every machine.
pytestmark = [pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM), pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Config:
    """Sizes of the task, the model and its attention."""

    names: int = 12
    values: int = 8
    pairs: int = 8  # of a name and a value, per sequence
    room: tuple[int, int] = (3, 4)  # for them, in spans of 16 tokens
    questions: tuple[int, int] = (8, 23)
    sequences: int = 8

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32

    window: int = 16  # compress_block_size
    stride: int = 16  # compress_stride
    block: int = 16  # select_block_size
    count: int = 3  # select_block_count
    nearest: int = 1  # num_local_blocks
    importance: str = "overlap"
    impl: str = "triton"

    @property
    def longest(self) -> int:
        """No sequence has more tokens."""
        return 16 * self.room[1] + self.questions[1]


class Batch(NamedTuple):
    """Packed sequences. A token holds a name and a value, where 0 is none."""

    names: Tensor
    values: Tensor
    answers: Tensor  # -1 where nothing is asked
    ends: list[int]


def sequence(config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs, strewn among empty tokens; behind them, names whose values are asked for."""

    def draw(bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))

    room, asked = 16 * draw(config.room), draw(config.questions)
    names, values = torch.zeros(2, room + asked, dtype=torch.long)
    answers = torch.full_like(names, -1)
    places = torch.randperm(room, generator=generator)[: config.pairs]
    names[places] = 1 + torch.randperm(config.names, generator=generator)[: config.pairs]
    values[places] = torch.randint(1, config.values + 1, places.shape, generator=generator)
    wanted = places[torch.randint(config.pairs, (asked,), generator=generator)]
    names[room:], answers[room:] = names[wanted], values[wanted] - 1
    return names, values, answers


def batches(config: Config, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        parts = [sequence(config, generator) for _ in range(config.sequences)]
        names, values, answers = (torch.cat(column) for column in zip(*parts, strict=True))
        yield Batch(names, values, answers, list(accumulate(len(part[0]) for part in parts)))


def lengths_of(ends: list[int]) -> list[int]:
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


class Attention(nn.Module):
    """The compressed and the selected branch, each behind a gate per token and head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        of_queries, of_keys = config.heads * config.head_size, config.kv_heads * config.head_size
        self.query = nn.Linear(config.width, of_queries, bias=False)
        self.key = nn.Linear(config.width, of_keys, bias=False)
        self.value = nn.Linear(config.width, of_keys, bias=False)
        weights = torch.full((2, config.window, config.kv_heads), config.window**-0.5)
        self.key_weight, self.value_weight = map(nn.Parameter, weights)
        self.gates = nn.Linear(config.width, 2 * config.heads)
        self.out = nn.Linear(of_queries, config.width, bias=False)
        for project in (self.query, self.key, self.value, self.out):
            nn.init.normal_(project.weight, std=config.width**-0.5)  # distinct scores from the start: it learns sooner
        self.ids = torch.empty(0)  # of the last call

    def forward(self, x: Tensor, ends: list[int]) -> Tensor:
        heads = (-1, self.config.head_size)
        query, key, value = (project(x).unflatten(-1, heads) for project in (self.query, self.key, self.value))
        compressed, self.ids = self.compressed(query, key, value, ends)
        selected = self.selected(query, key, value, ends)
        first, second = self.gates(x).sigmoid().unsqueeze(-1).chunk(2, dim=1)
        mixed: Tensor = self.out((first * compressed + second * selected).flatten(1))
        return mixed

    def compressed(self, query: Tensor, key: Tensor, value: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
        """The output of the first branch, and the blocks that it chooses for the second."""
        c = self.config
        keys, values = (
            nsa_compress(tokens, weight, c.window, c.stride, actual_seq_len=ends, impl=c.impl)
            for tokens, weight in ((key, self.key_weight), (value, self.value_weight))
        )
        windows = [max(0, (length - c.window) // c.stride + 1) for length in lengths_of(ends)]
        output, ids, _, _ = nsa_compress_attention(
            query, keys, values, c.head_size**-0.5, c.heads, c.window, c.stride, c.block, c.count,
            actual_seq_qlen=ends, actual_cmp_seq_kvlen=list(accumulate(windows)), causal=True,
            num_local_blocks=c.nearest, importance=c.importance, impl=c.impl,
        )  # fmt: skip
        return output, ids

    def selected(self, query: Tensor, key: Tensor, value: Tensor, ends: list[int]) -> Tensor:
        c = self.config
        output, _, _ = nsa_select_attention(
            query, key, value, self.ids, c.head_size**-0.5, c.heads, c.block, c.count,
            actual_seq_qlen=ends, actual_seq_kvlen=ends, causal=True, impl=c.impl,
        )  # fmt: skip
        return output


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.attention = Attention(config)
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, ends: list[int]) -> Tensor:
        attended: Tensor = x + self.attention(self.before_attention(x), ends)
        mixed: Tensor = attended + self.mlp(self.before_mlp(attended))
        return mixed


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.names = nn.Embedding(config.names + 1, config.width)
        self.values = nn.Embedding(config.values + 1, config.width)
        self.positions = nn.Embedding(config.longest, config.width)
        nn.init.normal_(self.positions.weight, std=0.1)  # the task has little use for them
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.values)

    def forward(self, batch: Batch) -> Tensor:
        positions = torch.cat([torch.arange(length) for length in lengths_of(batch.ends)])
        x = self.names(batch.names) + self.values(batch.values) + self.positions(positions)
        for layer in self.layers:
            x = layer(x, batch.ends)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def changed(self, config: Config) -> Model:
        """The same parameters in a model with another attention."""
        other = Model(config)
        other.load_state_dict(self.state_dict())
        return other


def training(model: Model, data: Iterator[Batch], rate: float) -> Iterator[float]:
    """The loss of each step in turn."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for batch in data:
        loss = cross_entropy(model(batch), batch.answers, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def accuracy(model: Model, data: Iterator[Batch]) -> float:
    """The share of the questions in a few batches that get the right answer."""
    right = [(model(batch).argmax(-1) == batch.answers)[batch.answers >= 0] for batch in islice(data, 4)]
    return torch.cat(right).float().mean().item()


def seeded(config: Config) -> Model:
    torch.manual_seed(0)
    return Model(config)


@torch.no_grad()
def without_selected_branch(model: Model) -> Model:
    other = model.changed(model.config)
    for attention in other.attentions():
        attention.gates.bias[model.config.heads :] = -torch.inf
    return other


def without_choice(model: Model) -> Model:
    """The blocks next to each token are selected, whatever their scores."""
    return model.changed(replace(model.config, nearest=model.config.count))


def test_a_model_learns_to_look_up_values():
    """Held-out sequences are answered, and not without the selected branch, nor by blocks that nobody chose."""
    model = seeded(Config())
    recent = deque([math.inf], maxlen=10)  # no mean before it is full
    for loss in islice(training(model, batches(model.config, seed=1), rate=5e-3), 250):
        recent.append(loss)
        if sum(recent) < 0.05 * len(recent):
            break
    answered, blind, unchosen = (
        accuracy(other, batches(model.config, seed=2))
        for other in (model, without_selected_branch(model), without_choice(model))
    )
    assert answered > 0.95
    assert blind < 0.5
    assert unchosen < 0.9


CURVES = [
    Config(sequences=2),
    Config(sequences=2, room=(5, 6), window=32, block=32, count=2, importance="cann"),
]
STEPS = 8


def curve(config: Config, impl: str) -> tuple[Tensor, Tensor]:
    """The losses of the first steps, and the blocks that all tokens chose in all steps and layers."""
    model = seeded(replace(config, impl=impl))
    losses, ids = [], []
    for loss in islice(training(model, batches(config, seed=1), rate=5e-3), STEPS):
        losses.append(loss)
        ids += [attention.ids.sort().values for attention in model.attentions()]
    return torch.tensor(losses, dtype=torch.float64), torch.cat(ids)


@pytest.mark.parametrize("config", CURVES, ids=["window=16", "window=32"])
def test_kernels_and_reference_give_the_same_losses(config):
    """From the same start and data, in float32.

    Both round to eps, but sum in another order: that moves a sum of n terms by sqrt(n) * eps of their size. The longest
    sums have a term for each token of the batch and head of a group. By so much may the first losses differ. Each step
    adds as much of what it changes the loss by, which stays below the first loss; there are too few steps for the
    differences to grow by themselves. Where another block is chosen, losses differ by far more, so the choices are
    compared first: the closest in these runs is between scores that are 1e-4 of their size apart, a hundred times what
    rounding moves them by.
    """
    actual, ids = curve(config, "triton")
    expected, expected_ids = curve(config, "reference")
    assert torch.equal(ids, expected_ids)
    terms = config.sequences * config.longest * config.heads // config.kv_heads
    per_step = math.sqrt(terms) * torch.finfo(torch.float32).eps * expected[0]
    assert ((actual - expected).abs() <= per_step * torch.arange(1, STEPS + 1)).all(), actual - expected
