"""A small transformer of NativeSparseAttention learns to look things up that its window alone does not reach."""

from __future__ import annotations

import math
from collections import deque
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from nsa_triton import NativeSparseAttention, NSAConfig
from tests import test_training
from tests.implementations import kernel_problem
from tests.test_training import accuracy, batches, training

PROBLEM = kernel_problem("sliding_window_attention")
# With one thread, sums have the same order on every machine.
pytestmark = [pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM), pytest.mark.usefixtures("one_thread")]

TASK = test_training.Config()
SIZES = NSAConfig(
    hidden_size=TASK.width, head_num=TASK.heads, key_value_head_num=TASK.kv_heads, head_dim=TASK.head_size,
    compress_block_size=16, compress_stride=16, select_block_size=16, select_block_count=3, window_size=8,
    num_init_blocks=0, num_local_blocks=1,
)  # fmt: skip
STEPS = 250


class WindowOnly(NativeSparseAttention):
    """The gates of the sparse branches are shut."""

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, key, value, gates = super().project(hidden)
        return query, key, value, gates.masked_fill(torch.tensor([True, True, False]), -math.inf)


class Layer(nn.Module):
    """A layer of the model of test_training.py, with other attention."""

    def __init__(self, config: test_training.Config, kind: type[NativeSparseAttention]) -> None:
        super().__init__()
        layer = test_training.Layer(config)
        self.before_attention, self.before_mlp, self.mlp = layer.before_attention, layer.before_mlp, layer.mlp
        self.attention = kind(SIZES, impl="triton")
        for name in ("query", "key", "value", "output"):
            # Distinct scores from the start: it learns sooner.
            nn.init.normal_(self.attention.get_parameter(f"{name}.weight"), std=config.width**-0.5)
        for weight in (self.attention.key_weight, self.attention.value_weight):
            nn.init.constant_(weight, SIZES.compress_block_size**-0.5)  # likewise: sums as large as what they are of

    def forward(self, x: Tensor, ends: list[int]) -> Tensor:
        attended: Tensor = x + self.attention(self.before_attention(x), cu_seqlens=[0, *ends])
        mixed: Tensor = attended + self.mlp(self.before_mlp(attended))
        return mixed


def trained(kind: type[NativeSparseAttention]) -> test_training.Model:
    torch.manual_seed(0)
    model = test_training.Model(TASK)
    model.layers = nn.ModuleList(Layer(TASK, kind) for _ in range(TASK.layers))
    recent = deque([math.inf], maxlen=10)  # no mean before it is full
    for loss in islice(training(model, batches(TASK, seed=1), rate=5e-3), STEPS):
        recent.append(loss)
        if sum(recent) < 0.05 * len(recent):
            break
    return model


def test_the_sparse_branches_do_the_work():
    """Held-out sequences are answered; with the window alone, trained for as long, they are not."""
    assert accuracy(trained(NativeSparseAttention), batches(TASK, seed=2)) > 0.95
    assert accuracy(trained(WindowOnly), batches(TASK, seed=2)) < 0.5
