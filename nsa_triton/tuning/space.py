"""The search space of every kernel, and what arithmetic rules out before a compiler is asked.

A space names the tiles that a kernel takes and the sizes to try, the launches whose time they decide, and relations
between them. A launch that is planned with a candidate is then held against lower bounds of the memory that it needs,
computed from its constexprs: what they refuse cannot fit, what they let pass may still not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nsa_triton.ascend.chips import Chip

FLOAT = 4  # bytes
Sizes = Mapping[str, int]
Options = Mapping[str, Any]

SMALL = (16, 32, 48, 64, 96, 128)
MIDDLE = (*SMALL, 192, 256)
LARGE = (16, 32, 64, 128, 256, 512)
TOKENS = (16, 32, 64, 96, 128, 192, 256, 512)
COLUMNS = (64, 96, 128, 192, 256)

# What the Ascend compiler may do otherwise with a kernel; the tiles are searched with the default's options. Left out
# are options that only debug, that one of the compilers does not have, and that take the overlap of cube and vector
# cores away.
VECTOR_OPTIONS: tuple[Options, ...] = ({}, {"multibuffer": False})
MIXED_OPTIONS: tuple[Options, ...] = (
    {},
    {"tile_mix_vector_loop": 1},
    {"tile_mix_vector_loop": 2},
    {"tile_mix_vector_loop": 4},
    {"tile_mix_cube_loop": 2},
    {"tile_mix_vector_loop": 2, "tile_mix_cube_loop": 2},
    {"set_workspace_multibuffer": 2},
    {"set_workspace_multibuffer": 2, "tile_mix_vector_loop": 1},
    {"limit_auto_multi_buffer_of_local_buffer": "no-l0c"},
    {"multibuffer": False},
)
CUDA_OPTIONS: tuple[Options, ...] = tuple(
    {"num_warps": warps, "num_stages": stages} for warps, stages in itertools.product((4, 2, 8), (3, 2, 4))
)


@dataclass(frozen=True)
class Space:
    """What to try for one kernel. `times`: the kernels whose launches the tiles decide, the kernel itself among them;
    what is compared is the sum of their times."""

    kernel: str
    tiles: Mapping[str, tuple[int, ...]]
    times: tuple[str, ...] = ()
    npu_options: tuple[Options, ...] = VECTOR_OPTIONS

    @property
    def timed(self) -> tuple[str, ...]:
        return self.times or (self.kernel,)

    def options(self, kind: str) -> tuple[Options, ...]:
        return {"npu": self.npu_options, "cuda": CUDA_OPTIONS}.get(kind, ({},))

    def candidates(self, kind: str = "npu") -> Iterator[dict[str, int]]:
        """All tiles; on a GPU, powers of two."""
        for sizes in itertools.product(*self.tiles.values()):
            tiles = dict(zip(self.tiles, sizes, strict=True))
            if kind != "cuda" or all(size & (size - 1) == 0 for size in sizes):
                yield tiles


def _mixed(kernel: str, times: tuple[str, ...] = (), **tiles: Any) -> Space:
    return Space(kernel, tiles, (kernel, *times) if times else (), MIXED_OPTIONS)


_SUM_PARTS = Space("sum_parts", {"BP": (16, 32, 64), "BE": (64, 128, 256, 512, 1024)})
_INVERSE = tuple(f"select_attention_{name}" for name in ("union", "count", "place", "fill", "dkv", "sum"))

# By op family: two of them have a kernel of the same name.
SPACES: Mapping[str, tuple[Space, ...]] = MappingProxyType(
    {
        "compress": (
            Space("compress_fwd", {"BT": TOKENS, "BD": COLUMNS}),
            Space("compress_bwd_dx", {"BT": TOKENS, "BD": COLUMNS}),
            Space(
                "compress_bwd_dw", {"BT": TOKENS, "BD": COLUMNS}, ("compress_bwd_dw", "sum_parts")
            ),
            _SUM_PARTS,
        ),
        "compress_infer": (Space("compress_infer", {"BD": MIDDLE}),),
        "compress_attention": (
            _mixed("attention_fwd", BQ=SMALL, BN=MIDDLE),
            # The layout of the scores is what the choice of blocks reads.
            _mixed("compress_attention_scores", times=("compress_attention_choose",), BQ=SMALL, BN=MIDDLE),
            Space("compress_attention_choose", {"BR": SMALL, "BC": MIDDLE}),
            Space("attention_terms", {"BQ": LARGE}),
            _mixed("attention_dq", BQ=SMALL, BN=MIDDLE),
            _mixed("attention_dkv", times=("sum_parts",), BQ=MIDDLE, BN=SMALL),
            _SUM_PARTS,
        ),
        "compress_attention_infer": (
            # How tokens are cut into tiles decides what the choice of blocks reads.
            _mixed("compress_attention_split", times=("compress_attention_choose",), BR=SMALL, BN=MIDDLE),
            Space("compress_attention_choose", {"BE": LARGE}),
        ),
        "select_attention": (
            Space("select_attention_union", {"BC": (16, 32, 48, 64)}),
            # Rows of a tile decide how many query tokens share a union of blocks.
            _mixed("select_attention_fwd", times=("select_attention_union",), BR=SMALL, BN=MIDDLE),
            Space("select_attention_terms", {"BM": LARGE}),
            # And backward also the inverse of these unions.
            _mixed("select_attention_dq", times=_INVERSE, BR=SMALL, BN=MIDDLE),
            Space(
                "select_attention_count", {"BT": SMALL}, ("select_attention_count", "select_attention_fill")
            ),
            Space("select_attention_place", {"BO": LARGE}),
            _mixed("select_attention_dkv", BN=MIDDLE),
            Space("select_attention_sum", {"BM": SMALL}),
        ),
        "sliding_window_attention": (
            _mixed("attention_fwd", BQ=SMALL, BN=MIDDLE),
            Space("attention_terms", {"BQ": LARGE}),
            _mixed("attention_dq", BQ=SMALL, BN=MIDDLE),
            _mixed("attention_dkv", times=("sum_parts",), BQ=MIDDLE, BN=SMALL),
            _SUM_PARTS,
        ),
        "gated_combine": (
            Space("gated_combine_fwd", {"BR": LARGE, "BD": COLUMNS}),
            Space("gated_combine_bwd", {"BR": LARGE, "BD": COLUMNS}),
        ),
        "select_attention_infer": (
            _mixed("paged_split", times=("paged_join",), BH=SMALL, BN=MIDDLE),
        ),
        "sliding_window_attention_infer": (
            _mixed("paged_split", times=("paged_join",), BH=SMALL, BN=MIDDLE),
        ),
    }
)  # fmt: skip


def space_of(family: str, kernel: str) -> Space:
    return next(space for space in SPACES[family] if space.kernel == kernel)


# ---- lower bounds of the memory that a launch needs, in bytes ----


@dataclass(frozen=True)
class Needs:
    """At least so much of a cube core's L0C and L1, and of a vector core's unified buffer. In bytes."""

    l0c: int = 0
    l1: int = 0
    ub: int = 0

    def refusal(self, chip: Chip, ub_limit: int) -> str:
        """Why the launch cannot fit; "" if it may."""
        for memory, needed, share in (("L0C", self.l0c, 100), ("L1", self.l1, 100), ("UB", self.ub, ub_limit)):
            if needed * 100 > chip.memory(memory) * share:
                part = f"{share} % of " if share < 100 else ""
                return f"{memory}: at least {needed} bytes are needed, {part}{chip.memory(memory)} are there"
        return ""


def largest_product(*shapes: tuple[int, int]) -> int:
    """L0C that the largest of these float32 products takes: one at a time must fit."""
    return max(rows * columns for rows, columns in shapes) * FLOAT


def operands(itemsize: int, *shapes: tuple[int, int]) -> int:
    """L1 that the operands of one product take: both are there at once."""
    return sum(rows * columns for rows, columns in shapes) * itemsize


def vector_tiles(*shapes: tuple[int, int], cores: int = 1) -> int:
    """Unified buffer of these float32 tiles, alive at once; the two vector cores beside a cube share the rows."""
    return sum(-(-rows // cores) * columns for rows, columns in shapes) * FLOAT


def _attention(rows: int, keys: int, c: Sizes, itemsize: int) -> Needs:
    """Scores [rows, keys], and the output [rows, BV] that the softmax rescales."""
    return Needs(
        largest_product((rows, keys), (rows, c["BV"])),
        operands(itemsize, (rows, c["BK"]), (keys, c["BK"])),
        vector_tiles((rows, keys), (rows, c["BV"]), cores=2),
    )


def _query_grad(rows: int, keys: int, c: Sizes, itemsize: int) -> Needs:
    """The scores, their gradient, and dq, which stays in the L0C."""
    return Needs(
        largest_product((rows, keys)) + largest_product((rows, c["BK"])),
        operands(itemsize, (rows, c["BK"]), (keys, c["BK"])),
        vector_tiles((rows, keys), cores=2),
    )


def _key_grads(rows: int, keys: int, c: Sizes, itemsize: int) -> Needs:
    """dk and dv, which stay in the L0C, and the scores."""
    return Needs(
        largest_product((keys, c["BK"])) + largest_product((keys, c["BV"])) + largest_product((keys, rows)),
        operands(itemsize, (rows, c["BK"]), (keys, c["BK"])),
        vector_tiles((keys, rows), cores=2),
    )


def _scores(c: Sizes, itemsize: int) -> Needs:
    return Needs(
        largest_product((c["BN"], c["BQ"]), (c["BF"], c["BQ"])),
        operands(itemsize, (c["BN"], c["BK"]), (c["BQ"], c["BK"])),
        vector_tiles((c["BN"], c["BQ"]), cores=2),
    )


NEEDS: Mapping[str, Callable[[Sizes, int], Needs]] = MappingProxyType(
    {
        "compress_fwd": lambda c, size: Needs(ub=c["BR"] * c["BD"] * size),
        "compress_bwd_dx": lambda c, size: Needs(ub=vector_tiles((c["BC"] * c["BS"], c["BD"]))),
        "compress_bwd_dw": lambda c, size: Needs(ub=c["BR"] * c["BD"] * size),
        "sum_parts": lambda c, size: Needs(ub=vector_tiles((c["BP"], c["BE"]))),
        "attention_fwd": lambda c, size: _attention(c["BQ"], c["BN"], c, size),
        "compress_attention_scores": _scores,
        "attention_dq": lambda c, size: _query_grad(c["BQ"], c["BN"], c, size),
        "attention_dkv": lambda c, size: _key_grads(c["BQ"], c["BN"], c, size),
        "compress_attention_split": lambda c, size: _attention(c["BQ"] * c["BH"], c["BN"], c, size),
        "select_attention_fwd": lambda c, size: _attention(c["BR"], c["BN"], c, size),
        "select_attention_dq": lambda c, size: _query_grad(c["BR"], c["BN"], c, size),
        "gated_combine_fwd": lambda c, size: Needs(ub=4 * c["BR"] * c["BD"] * size),
        "gated_combine_bwd": lambda c, size: Needs(ub=7 * c["BR"] * c["BD"] * size),
        "select_attention_dkv": lambda c, size: _key_grads(c["BR"], c["BN"], c, size),
        "paged_split": lambda c, size: _attention(c["BH"], c["BN"], c, size),
    }
)


def needs(kernel: str, constexprs: Sizes, itemsize: int) -> Needs:
    """What a launch of `kernel` needs at least. Kernels without products and large tiles are left to the compiler."""
    bound = NEEDS.get(kernel)
    return Needs() if bound is None else bound(constexprs, itemsize)


def disagreement(kernel: str, constexprs: Sizes) -> str:
    """What is wrong with tiles of two kernels together; "" if nothing is."""
    if kernel == "compress_attention_choose" and constexprs.get("BQ", 0) % constexprs.get("BR", 1):
        return f"BQ of compress_attention_scores, {constexprs['BQ']}, is no multiple of BR, {constexprs['BR']}"
    return ""
