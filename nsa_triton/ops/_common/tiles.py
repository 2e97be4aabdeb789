"""Tables of tiles: where the work of a ragged batch lies, made on the host and cached by value."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def split(counts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut `counts[b]` things of every segment b into tiles of `size`: the segment and the first thing of each tile."""
    tiles = -(-counts // size)
    segment = np.repeat(np.arange(len(counts)), tiles)
    first = (np.arange(len(segment)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * size
    return segment, first


def table(columns: Iterable[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(tuple(columns), axis=1).astype(np.int32)).to(device)


def _lengths(ends: tuple[int, ...]) -> np.ndarray:
    lengths: np.ndarray = np.diff(np.asarray(ends, dtype=np.int64), prepend=0)
    return lengths


def _before(lengths: np.ndarray) -> np.ndarray:
    """The sum of the lengths before each."""
    before: np.ndarray = np.cumsum(lengths) - lengths
    return before


@dataclass(frozen=True)
class Ragged:
    """Queries and keys of a batch, packed: inclusive prefix sums of the lengths of each segment."""

    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]

    @functools.cached_property
    def queries(self) -> np.ndarray:
        """[B] query tokens of each segment."""
        return _lengths(self.query_ends)

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """[B] key tokens of each segment."""
        return _lengths(self.key_ends)

    @functools.cached_property
    def first_query(self) -> np.ndarray:
        return _before(self.queries)

    @functools.cached_property
    def first_key(self) -> np.ndarray:
        return _before(self.keys)

    def fills(self, queries: int, keys: int) -> bool:
        """Whether each of that many rows of queries meets keys of its segment, and the other way round."""
        both = ((self.queries > 0) == (self.keys > 0)).all()
        return bool(both) and (self.query_ends[-1], self.key_ends[-1]) == (queries, keys)


@functools.lru_cache(maxsize=64)
def query_tiles(
    ragged: Ragged, per_tile: int, device: torch.device, *, with_keys: bool = False, at_end: bool = False
) -> Tensor:
    """[tiles, 6] of each tile of `per_tile` query tokens: first row of q; first token, counted within its segment, and
    tokens of the tile; query tokens of the segment; first row of k and key tokens of the segment. `with_keys` leaves
    out segments that have no keys. `at_end` counts tokens from the first key on, where the last query token stands at
    the last key."""
    segment, first = split(np.where(ragged.keys > 0, ragged.queries, 0) if with_keys else ragged.queries, per_tile)
    place = first + (ragged.keys - ragged.queries)[segment] if at_end else first
    columns = (
        ragged.first_query[segment] + first,
        place,
        np.minimum(per_tile, ragged.queries[segment] - first),
        ragged.queries[segment],
        ragged.first_key[segment],
        ragged.keys[segment],
    )
    return table(columns, device)


def key_tiles(
    ragged: Ragged, per_tile: int, device: torch.device, *, with_queries: bool = False, at_end: bool = False
) -> Tensor:
    """[tiles, 6] of each tile of `per_tile` key tokens: first row of k; first token, counted within its segment, and
    tokens of the tile; key tokens of the segment; first row of q and query tokens of the segment. `with_queries` leaves
    out segments that have no queries. `at_end` counts tokens from the first query token on, where the last ones of both
    stand side by side."""
    turned = Ragged(ragged.key_ends, ragged.query_ends)
    return query_tiles(turned, per_tile, device, with_keys=with_queries, at_end=at_end)
