"""Native sparse attention once more, as the paper has it: token by token, in float64, by plain PyTorch.

Nothing of the package is used. Which blocks are chosen is decided by sorting; everything else is differentiable.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attention(scores: Tensor, values: Tensor) -> Tensor:
    """Softmax of scores [n], and the sum of values [n, D] by it; 0 if there are none."""
    return torch.softmax(scores, 0) @ values if len(scores) else values.sum(0)


def overlap(config, window: int, block: int) -> int:
    """Strides that a compression window and a selection block share."""
    strides, reach = (
        config.select_block_size // config.compress_stride,
        config.compress_block_size // config.compress_stride,
    )
    return len(set(range(window, window + reach)) & set(range(block * strides, (block + 1) * strides)))


def chosen_blocks(config, t: int, weights: Tensor) -> list[int]:
    """The blocks of a token at place t; weights [n] are those of the windows that it sees, summed over a group."""
    own = t // config.select_block_size
    scores = [sum(float(w) * overlap(config, i, j) for i, w in enumerate(weights)) for j in range(own + 1)]
    forced = {j for j in range(own + 1) if j < config.num_init_blocks or j > own - config.num_local_blocks}
    others = sorted(set(range(own + 1)) - forced, key=lambda j: (-scores[j], j))
    return (sorted(forced) + others)[: config.select_block_count]


def of_one_sequence(config, query, key, value, gates, key_weight, value_weight) -> Tensor:
    """[T, N1, Dv] of tensors like those of `native_sparse_attention`, for one sequence."""
    block, stride, kv_heads = config.compress_block_size, config.compress_stride, config.key_value_head_num
    starts = range(0, len(key) - block + 1, stride)
    keys, values = (
        torch.stack([(x[s : s + block] * w[:, :, None]).sum(0) for s in starts]) if starts else x[:0]
        for x, w in ((key[:, :kv_heads], key_weight), (value[:, :kv_heads], value_weight))
    )
    group, scale = config.head_num // config.key_value_head_num, config.head_dim**-0.5
    rows = []
    # raw keys and values of the selected and the local branch
    own = config.key_value_head_num if config.separate_key_values else 0
    raw = [(key[:, own * i :], value[:, own * i :]) for i in (1, 2)]
    for t in range(len(query)):
        seen = len([s for s in starts if s + block - 1 <= t])
        past, recent = torch.arange(t + 1), torch.arange(max(0, t + 1 - config.window_size), t + 1)
        heads = []
        for n in range(config.key_value_head_num):
            mine = range(n * group, (n + 1) * group)
            to_windows = [keys[:seen, n] @ query[t, h] * scale for h in mine]
            weights = torch.stack([torch.softmax(s.detach(), 0) for s in to_windows]).sum(0)
            blocks = torch.tensor(chosen_blocks(config, t, weights))
            chosen = past[torch.isin(past // config.select_block_size, blocks)]
            for h, s in zip(mine, to_windows, strict=True):
                branches = [attention(s, values[:seen, n])]
                for (k, v), i in zip(raw, (chosen, recent), strict=True):
                    branches.append(attention(k[i, n] @ query[t, h] * scale, v[i, n]))
                heads.append((torch.sigmoid(gates[t, h])[:, None] * torch.stack(branches)).sum(0))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def native_sparse_attention(config, query, key, value, gates, key_weight, value_weight, bounds) -> Tensor:
    """The same for packed sequences."""
    parts = []
    for begin, end in pairwise(bounds):
        if end > begin:
            query_, key_, value_, gates_ = (x[begin:end] for x in (query, key, value, gates))
            parts.append(of_one_sequence(config, query_, key_, value_, gates_, key_weight, value_weight))
    return torch.cat(parts)


def module(attention_module, hidden: Tensor, bounds) -> Tensor:
    """What a NativeSparseAttention makes of packed tokens, from its parameters."""
    state: dict[str, Tensor] = {
        name: p.double() if p.dtype != torch.float64 else p for name, p in attention_module.named_parameters()
    }
    c = attention_module.config
    kv_heads = c.key_value_head_num * (3 if c.separate_key_values else 1)

    def project(name: str, heads: int) -> Tensor:
        features = hidden @ state[f"{name}.weight"].T
        if f"{name}.bias" in state:
            features = features + state[f"{name}.bias"]
        return features.view(len(hidden), heads, -1)

    query, key, value, gates = (
        project("query", c.head_num), project("key", kv_heads), project("value", kv_heads),
        project("gate", c.head_num),
    )  # fmt: skip
    weights = (state["key_weight"], state["value_weight"])
    attended = native_sparse_attention(c, query, key, value, gates, *weights, bounds)
    return torch.matmul(attended.flatten(1), state["output.weight"].T)
