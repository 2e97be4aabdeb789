"""Train a small transformer whose attention is NativeSparseAttention, on packed sequences of different lengths.

A sequence counts in steps, modulo 5; the size of its steps is said by its first token only.
"""

import argparse
from itertools import accumulate

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nsa_triton import NativeSparseAttention, NSAConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", default="cpu", help="cpu, npu or cuda (default: cpu, by the NPU's lowering)")
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--impl", default="auto", choices=("auto", "triton", "reference"))
options = parser.parse_args()

MODULUS, WIDTH = 5, 64
CONFIG = NSAConfig(WIDTH, head_num=4, key_value_head_num=2, head_dim=16, select_block_count=4, window_size=16)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = NativeSparseAttention(CONFIG, impl=options.impl)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, hidden, cu_seqlens):
        hidden = hidden + self.attention(self.norms[0](hidden), cu_seqlens=cu_seqlens)
        return hidden + self.mlp(self.norms[1](hidden))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2 * MODULUS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, MODULUS))

    def forward(self, tokens, cu_seqlens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden, cu_seqlens)
        return self.head(hidden)


def batch(lengths):
    """Packed tokens [T], and where their sequences begin and end."""
    rows = []
    for length in lengths:
        first, step = torch.randint(MODULUS, (2,)).tolist()
        rows.append(torch.cat([torch.tensor([MODULUS + step]), (first + step * torch.arange(length - 1)) % MODULUS]))
    return torch.cat(rows).to(options.device), [0, *accumulate(lengths)]


torch.manual_seed(0)
model = Model().to(options.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(1, options.steps + 1):
    tokens, bounds = batch(torch.randint(40, 100, (6,)).tolist())
    known = torch.ones(len(tokens), dtype=torch.bool, device=options.device)
    known[bounds[:-1]] = False  # where a sequence begins to count is its own affair,
    known[[end - 1 for end in bounds[1:]]] = False  # and what comes behind its end is not known
    logits, answers = model(tokens, bounds)[known], tokens.roll(-1)[known]
    loss = cross_entropy(logits, answers)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == 1:
        right = 100 * (logits.argmax(-1) == answers).float().mean().item()
        print(f"step {step:3}: {len(tokens)} tokens, loss {loss.item():.3f}, {right:3.0f} % right", flush=True)
