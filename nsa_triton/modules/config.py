"""The sizes of native sparse attention, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from nsa_triton.errors import ArgumentValueError
from nsa_triton.ops._common.arguments import check_bool, check_importance, check_int, check_scale

if TYPE_CHECKING:
    from torch import Tensor

MOST_HEADS, MOST_HEAD_DIM = 128, 256  # what nsa_compress takes
BRANCHES = 3


@dataclass(frozen=True)
class NSAConfig:
    """Heads, windows and blocks of native sparse attention. docs/module.md says what they mean and cost.

    Args:
        hidden_size: features of a token, what the module projects from and to.
        head_num: query heads, N1, a multiple of `key_value_head_num`.
        key_value_head_num: N2, from 1 to 128. The heads of a group attend to the same blocks.
        head_dim: the size of queries and keys, a multiple of 16 from 16 to 256.
        value_dim: the size of values, likewise. None: `head_dim`.
        compress_block_size: l, raw tokens per compression window, a multiple of 16 from 16 to 128.
        compress_stride: d, raw tokens between two windows, a multiple of 16 up to l.
        select_block_size: l', raw tokens per selection block, a multiple of d, at least l.
        select_block_count: K, blocks that each query token selects, forced ones included.
        window_size: newest tokens that each query token sees in any case.
        num_init_blocks: blocks at the beginning that are always selected.
        num_local_blocks: newest blocks, that of the query token included, that are always selected; 1 or more.
        importance: how blocks are scored, "overlap" (the paper) or "cann"; see `nsa_compress_attention`.
        scale: what scores are multiplied by. None: head_dim ** -0.5.
        separate_key_values: whether each branch has keys and values of its own, as in the paper: three times
            `key_value_head_num` heads, those of the compressed branch first, then of the selected and the local one.
            Raw keys and values in a cache then take three times the room.

    Raises:
        ArgumentTypeError: (a TypeError) a number is not an int.
        ArgumentValueError: (a ValueError) a number is not as above; the message says which, and what would be right.
    """

    hidden_size: int
    head_num: int
    key_value_head_num: int
    head_dim: int
    value_dim: int | None = None
    compress_block_size: int = 32
    compress_stride: int = 16
    select_block_size: int = 64
    select_block_count: int = 16
    window_size: int = 512
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    importance: str = "overlap"
    scale: float | None = None
    separate_key_values: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.type == "int | None" and value is not None):
                check_int(field.name, value)
            if field.type == "bool":
                check_bool(field.name, value)
        self._check_sizes()
        check_importance(self.importance)
        if self.scale is not None:
            check_scale("scale", self.scale)

    def _check_sizes(self) -> None:
        _check("hidden_size", self.hidden_size, 1)
        _check("key_value_head_num", self.key_value_head_num, 1, MOST_HEADS)
        _check("head_num", self.head_num, 1, multiple=self.key_value_head_num, of="key_value_head_num")
        for name in ("head_dim", "value_dim"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 16, MOST_HEAD_DIM, multiple=16)
        block, stride = self.compress_block_size, self.compress_stride
        _check("compress_block_size", block, 16, 128, multiple=16)
        _check("compress_stride", stride, 16, block, multiple=16)
        _check("select_block_size", self.select_block_size, block, multiple=stride, of="compress_stride")
        _check("window_size", self.window_size, 1)
        _check("num_init_blocks", self.num_init_blocks, 0)
        _check("num_local_blocks", self.num_local_blocks, 1)
        forced = self.num_init_blocks + self.num_local_blocks
        if self.select_block_count < forced:
            expected = f"at least {forced}, the forced blocks (num_init_blocks + num_local_blocks)"
            raise ArgumentValueError("select_block_count", expected, self.select_block_count)

    @property
    def value_size(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def raw_head_num(self) -> int:
        """Heads of keys and values that are not compressed, of all branches."""
        return self.key_value_head_num * (BRANCHES if self.separate_key_values else 1)

    def branches(self, name: str, raw: Tensor) -> Sequence[Tensor]:
        """The heads of raw keys or values [..., heads, D] that the compressed, the selected and the local branch see;
        `name` is what errors call them."""
        if raw.dim() < 2 or raw.shape[-2] != self.raw_head_num:
            times = f" = {BRANCHES} * key_value_head_num, one set for each branch" if self.separate_key_values else ""
            raise ArgumentValueError(name, f"[T, {self.raw_head_num}, head size]{times}", list(raw.shape))
        return raw.chunk(BRANCHES, -2) if self.separate_key_values else (raw,) * BRANCHES

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else float(self.scale)

    def windows(self, tokens: int) -> int:
        """Compressed tokens of a sequence: its complete windows."""
        return max(0, (tokens - self.compress_block_size) // self.compress_stride + 1)


def _check(name: str, value: int, low: int, high: int | None = None, *, multiple: int = 1, of: str = "") -> None:
    if value >= low and (high is None or value <= high) and value % multiple == 0:
        return
    kind = "an integer" if multiple == 1 else f"a multiple of {multiple}"
    named = f" ({of})" if of else ""
    ends = f", at least {low}" if high is None else f" from {low} to {high}"
    raise ArgumentValueError(name, f"{kind}{named}{ends}", value)
