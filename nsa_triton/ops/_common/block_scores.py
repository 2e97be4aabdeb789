"""How selection blocks are scored and chosen: the part of the specification that training and inference share.

A selection block is M = l' / d strides long, a compression window NN = l / d. Block j gathers what falls on it:

    imp[j] = sum over u = 0 .. M + NN - 2 of  min(u + 1, NN, M + NN - 1 - u) * P[M * (j + 1) - u - shift]

with P = 0 outside of the sequence. shift is 0 for importance "cann" and 1 for "overlap", where block j gathers the
windows that truly overlap it.
"""

from __future__ import annotations

import torch
from torch import Tensor

IMPORTANCES = ("cann", "overlap")


def block_importance(weights: Tensor, blocks: int, strides: int, reach: int, importance: str) -> Tensor:
    """imp [..., blocks] of P [..., n], where a selection block is `strides` and a window `reach` strides long."""
    n, shift = weights.shape[-1], int(importance == "overlap")
    imp = weights.new_zeros((*weights.shape[:-1], blocks))
    for u in range(strides + reach - 1):
        place = strides * torch.arange(1, blocks + 1, device=weights.device) - u - shift
        exists = (place >= 0) & (place < n)
        gathered = weights[..., place.clamp(0, n - 1)] if n else imp
        imp = imp + min(u + 1, reach, strides + reach - 1 - u) * gathered.masked_fill(~exists, 0.0)
    return imp


def best_blocks(scores: Tensor, forced: Tensor, count: int) -> Tensor:
    """The ids [..., count] of scores [..., nb]: forced blocks, then the others by descending score, then -1.

    Forced and equal ones go by ascending number, and NaN counts as a score of 0. `forced` is a bool tensor that
    broadcasts to `scores`.
    """
    ranked = scores.masked_fill(scores.isnan(), 0.0).masked_fill(forced, torch.inf)
    ids = torch.full((*scores.shape[:-1], count), -1, dtype=torch.int32, device=scores.device)
    chosen = min(count, scores.shape[-1])
    ids[..., :chosen] = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :chosen].int()
    return ids


def scores_at(ids: Tensor, scores: Tensor) -> Tensor:
    """The scores [..., K] of ids [..., K]; -1 for no block."""
    blocks = scores.shape[-1]
    ids = ids.long()
    exists = (ids >= 0) & (ids < blocks)
    padded = torch.nn.functional.pad(scores, (0, 1), value=-1.0)
    return padded.gather(-1, torch.where(exists, ids, blocks))
