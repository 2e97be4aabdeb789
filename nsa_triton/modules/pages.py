"""Which pages of a cache belong to which sequence: bookkeeping on the host, without tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Sequence:
    """A sequence in a cache: how many tokens it has, and the pages that hold them, in order."""

    tokens: int = 0
    pages: list[int] = field(default_factory=list)


class Growth(NamedTuple):
    """A sequence that is to have `after` tokens; its pages from number `first` on are written to."""

    sequence: Sequence
    after: int
    first: int


class PagePool:
    """A fixed number of pages. Sequences share the pages of a common prefix; whoever writes to one copies it first."""

    def __init__(self, count: int, page_size: int) -> None:
        self.count, self.page_size = count, page_size
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count

    @property
    def available(self) -> int:
        """Pages that belong to nobody."""
        return len(self._free)

    def needed(self, growths: Iterable[Growth]) -> int:
        """How many pages `grow` would take for these sequences, one after the other."""
        left: Counter[int] = Counter()
        count = 0
        for sequence, after, first in growths:
            count += self._pages(after) - len(sequence.pages)
            for page in sequence.pages[first:]:
                if self._users[page] - left[page] > 1:
                    left[page] += 1
                    count += 1
        return count

    def grow(self, growth: Growth) -> list[tuple[int, int]]:
        """Give a sequence the pages that it needs, and those of its own that it writes to. Returns what is to be
        copied: pairs of a shared page and the one that replaces it. `needed` pages must be available."""
        sequence, after, first = growth
        copies = []
        for number in range(first, len(sequence.pages)):
            shared = sequence.pages[number]
            if self._users[shared] > 1:
                sequence.pages[number] = self._take()
                self._users[shared] -= 1
                copies.append((shared, sequence.pages[number]))
        sequence.pages += [self._take() for _ in range(self._pages(after) - len(sequence.pages))]
        sequence.tokens = after
        return copies

    def fork(self, sequence: Sequence) -> Sequence:
        """Another sequence with the same tokens, in the same pages."""
        for page in sequence.pages:
            self._users[page] += 1
        return Sequence(sequence.tokens, list(sequence.pages))

    def shrink(self, sequence: Sequence, tokens: int) -> None:
        """Keep the first `tokens` tokens and give back the pages behind them."""
        kept = self._pages(tokens)
        for page in sequence.pages[kept:]:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
        del sequence.pages[kept:]
        sequence.tokens = tokens

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
