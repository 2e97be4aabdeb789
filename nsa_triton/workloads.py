"""The calls of every operator at the shapes of models: what `tune`, `bench` and the simulated tables iterate over.

work = workload("nsa_select_attention", SHAPES["paper"], 8192)
work.call("triton")                      # or "reference"
work.flops, work.bytes                   # what the result needs at least
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import nsa_triton
from nsa_triton.errors import ArgumentValueError


@dataclass(frozen=True)
class Shape:
    """The attention of a model: heads and their sizes, compression windows, selection blocks, pages of its caches, and
    tokens of the sliding window."""

    name: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 32
    stride: int = 16
    block: int = 64
    count: int = 16
    page: int = 128
    local: int = 512

    @property
    def group(self) -> int:
        """Query heads of each kv head."""
        return self.heads // self.kv_heads

    def part(self, tokens: int, *, selected: bool = False) -> Shape:
        """As many of the heads, whole groups of them, as keep every core of a chip busy with that many query tokens:
        the others are the same work again. Attention over selected blocks has tiles of few tokens, with all heads of
        a group."""
        groups = -(-BUSY_TOKENS // tokens) if selected else -(-BUSY_ROWS // (self.group * tokens))
        if groups >= self.kv_heads:
            return self
        return replace(self, heads=groups * self.group, kv_heads=groups)

    def windows(self, tokens: int) -> int:
        """Compressed tokens of a sequence."""
        return (tokens - self.window) // self.stride + 1

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)


def _shapes() -> dict[str, Shape]:
    """That of the paper, and grouped queries of common sizes: 32 heads in groups of 1, 4 and 16."""
    grouped = [
        Shape(f"gqa-d{size}-g{group}", 32, 32 // group, size, size) for size in (128, 64) for group in (1, 4, 16)
    ]
    return {shape.name: shape for shape in (Shape("paper", 64, 4, 192, 128), *grouped)}


SHAPES = _shapes()
INDICES = ("random", "scores", "local")
BATCH = 16  # sequences that decode together, where nothing else is asked for
BUSY_ROWS = 65536  # query tokens times heads: about twenty tiles for every core
BUSY_TOKENS = 4096  # query tokens times kv heads, where blocks are selected: ten tiles and more for every core
RUN = 8  # adjacent query tokens with the same best blocks
LISTS = tuple(f"select_attention_{name}" for name in ("union", "count", "place", "fill"))


@dataclass(frozen=True)
class Workload:
    """One call of one operator.

    flops        of the products that the result needs; of causal attention those of visible tokens only
    bytes        the least that must be moved: inputs once, of keys and values those that are attended to, and outputs
                 once; without tables of pages, slots and lengths
    live_blocks  mean number of blocks that a query token attends to with a kv head; None where nothing is selected
    fills        kernels whose results, lists of blocks, control other kernels
    """

    op: str
    shape: Shape
    dtype: torch.dtype
    tokens: int
    batch: int
    indices: str
    inputs: Mapping[str, Tensor]
    compute: Callable[[Mapping[str, Tensor], str], Any]  # of such inputs and an impl
    flops: int
    bytes: int
    live_blocks: float | None = None
    fills: tuple[str, ...] = ()

    def call(self, impl: str) -> Any:
        """The result of the operator; impl is "triton" or "reference"."""
        return self.compute(self.inputs, impl)


def workload(
    op: str,
    shape: Shape,
    tokens: int,
    *,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    indices: str = "scores",
    filled: bool = True,
    seed: int = 0,
) -> Workload:
    """A call of `op`, the name of a public function.

    Args:
        op: one of OPS.
        shape: one of SHAPES, or another.
        tokens: the length of each sequence. Training operators compute all of its tokens, packed with the others;
            decoding operators its newest one.
        batch: sequences; None: one for training, BATCH for decoding.
        indices: how selected blocks are distributed. "random": any of the past. "scores": as attention scores choose
            them, the first block, the newest two and others, nearly the same ones for adjacent tokens. "local": the
            newest.
        filled: False: tensors of floats are left as they come and must not be read. Ids, pages and lengths are real.
    """
    _require("op", op, OPS)
    _require("indices", indices, INDICES)
    if tokens < shape.window:
        raise ArgumentValueError("tokens", f"at least {shape.window}, one window", tokens)
    sequences = batch if batch is not None else (BATCH if op.endswith("_infer") else 1)
    if sequences < 1:
        raise ArgumentValueError("batch", "at least 1", batch)
    target = torch.device(device)
    return _BUILDERS[op](_Request(op, shape, tokens, sequences, indices, target, dtype, filled, seed))


def shape_named(name: str) -> Shape:
    """A shape of SHAPES by its name."""
    _require("shape", name, tuple(SHAPES))
    return SHAPES[name]


def _require(argument: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ArgumentValueError(argument, f"one of {', '.join(valid)}", repr(value))


# ---- how a request becomes tensors ----


@dataclass(frozen=True)
class _Request:
    op: str
    shape: Shape
    tokens: int
    batch: int
    indices: str
    device: torch.device
    dtype: torch.dtype
    filled: bool
    seed: int

    @functools.cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    @property
    def windows(self) -> int:
        return self.shape.windows(self.tokens)

    def tensor(self, *size: int) -> Tensor:
        if not self.filled:
            return torch.empty(size, dtype=self.dtype, device=self.device)
        return torch.randn(size, dtype=self.dtype, device=self.device, generator=self.generator)

    def ends(self, each: int) -> list[int]:
        """Prefix sums of `batch` sequences of that length."""
        return list(itertools.accumulate([each] * self.batch))

    def packed(self, each: int) -> dict[str, Tensor]:
        """Query tokens of all sequences, and `each` keys and values per sequence."""
        shape, queries, keys = self.shape, self.batch * self.tokens, self.batch * each
        return {
            "q": self.tensor(queries, shape.heads, shape.key_dim),
            "k": self.tensor(keys, shape.kv_heads, shape.key_dim),
            "v": self.tensor(keys, shape.kv_heads, shape.value_dim),
        }

    def paged(self, each: int) -> dict[str, Tensor]:
        """Caches with `each` keys and values per sequence, and the table of their pages, which lie in order."""
        shape, pages = self.shape, -(-each // self.shape.page)
        cache = (self.batch * pages, shape.page, shape.kv_heads)
        table = torch.arange(self.batch * pages, dtype=torch.int32, device=self.device).view(self.batch, pages)
        return {"k": self.tensor(*cache, shape.key_dim), "v": self.tensor(*cache, shape.value_dim), "table": table}

    def outputs(self, forward: Callable[[], tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """What a gradient is made from, beside the inputs of its forward call: g, and what that call returned."""
        size = (self.batch * self.tokens, self.shape.heads)
        grad = self.tensor(*size, self.shape.value_dim)
        if self.filled:
            out, *_, largest, total = forward()
        else:
            out = self.tensor(*size, self.shape.value_dim)
            largest, total = (torch.empty((*size, 8), device=self.device) for _ in range(2))
        return {"g": grad, "out": out, "softmax_max": largest, "softmax_sum": total}

    def workload(
        self, inputs: Mapping[str, Tensor], compute: Callable[[Mapping[str, Tensor], str], Any], **counts: Any
    ) -> Workload:
        return Workload(
            self.op, self.shape, self.dtype, self.tokens, self.batch, self.indices, inputs, compute, **counts
        )


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- compression ----


def _compress(request: _Request) -> Workload:
    shape, ends = request.shape, request.ends(request.tokens)
    inputs = _to_compress(request)

    def compute(t: Mapping[str, Tensor], impl: str) -> Tensor:
        return nsa_triton.nsa_compress(t["x"], t["w"], shape.window, shape.stride, actual_seq_len=ends, impl=impl)

    read, written = _compressed_elements(request)
    weights = shape.window * shape.kv_heads
    moved = (read + weights + written) * request.dtype.itemsize
    return request.workload(inputs, compute, flops=2 * written * shape.window, bytes=moved)


def _compress_grad(request: _Request) -> Workload:
    shape, ends = request.shape, request.ends(request.tokens)
    inputs = {
        **_to_compress(request),
        "g": request.tensor(request.batch * request.windows, shape.kv_heads, shape.key_dim),
    }

    def compute(t: Mapping[str, Tensor], impl: str) -> tuple[Tensor, ...]:
        sizes = (shape.window, shape.stride)
        return nsa_triton.nsa_compress_grad(t["g"], t["x"], t["w"], *sizes, actual_seq_len=ends, impl=impl)

    read, windows = _compressed_elements(request)
    gradients = inputs["x"].numel() + inputs["w"].numel()
    moved = (windows + read + inputs["w"].numel() + gradients) * request.dtype.itemsize
    return request.workload(inputs, compute, flops=2 * 2 * windows * shape.window, bytes=moved)


def _to_compress(request: _Request) -> dict[str, Tensor]:
    shape = request.shape
    x = request.tensor(request.batch * request.tokens, shape.kv_heads, shape.key_dim)
    return {"x": x, "w": request.tensor(shape.window, shape.kv_heads)}


def _compressed_elements(request: _Request) -> tuple[int, int]:
    """Elements that the windows cover, and elements of the windows' sums."""
    shape = request.shape
    covered = (request.windows - 1) * shape.stride + shape.window
    of_token = request.batch * shape.kv_heads * shape.key_dim
    return covered * of_token, request.windows * of_token


def _compress_infer(request: _Request) -> Workload:
    shape, batch = request.shape, request.batch
    cache = request.paged(request.tokens)
    slots = torch.arange(batch, dtype=torch.int32, device=request.device)
    weight = request.tensor(shape.window, shape.kv_heads)
    inputs = {"x": cache["k"], "w": weight, "slots": slots, "table": cache["table"]}

    @functools.cache
    def written(impl: str, dtype: torch.dtype) -> Tensor:
        """Each impl writes into a tensor of its own, so that results can be compared."""
        return torch.zeros((batch, shape.kv_heads, shape.key_dim), dtype=dtype, device=request.device)

    def compute(t: Mapping[str, Tensor], impl: str) -> Tensor:
        sizes, out = (shape.window, shape.stride, shape.page), written(impl, t["x"].dtype)
        lengths = [request.tokens] * batch
        return nsa_triton.nsa_compress_infer(
            t["x"], t["w"], t["slots"], *sizes, block_table=t["table"], actual_seq_len=lengths, cache=out, impl=impl
        )

    completes = (request.tokens - shape.window) % shape.stride == 0
    elements = batch * shape.kv_heads * shape.key_dim if completes else 0
    weights = shape.window * shape.kv_heads if completes else 0
    moved = (elements * shape.window + weights + elements) * request.dtype.itemsize
    return request.workload(inputs, compute, flops=2 * elements * shape.window, bytes=moved)


# ---- attention over compressed tokens ----


def _compress_attention(request: _Request) -> Workload:
    shape, inputs = request.shape, request.packed(request.windows)
    shared = _compressed_lengths(request)

    def compute(t: Mapping[str, Tensor], impl: str) -> tuple[Tensor, ...]:
        return nsa_triton.nsa_compress_attention(
            t["q"], t["k"], t["v"], shape.key_dim**-0.5, shape.heads, shape.window, shape.stride, shape.block,
            shape.count, num_init_blocks=1, num_local_blocks=2, **shared, impl=impl,
        )  # fmt: skip

    rows = request.batch * request.tokens
    ids, statistics = 4 * rows * shape.kv_heads * shape.count, 2 * 4 * 8 * rows * shape.heads
    out = rows * shape.heads * shape.value_dim * request.dtype.itemsize
    return request.workload(
        inputs,
        compute,
        flops=_forward_flops(shape, _visible_windows(request)),
        bytes=_bytes(*inputs.values()) + out + statistics + ids,
    )


def _compress_attention_grad(request: _Request) -> Workload:
    shape, forward = request.shape, _compress_attention(request)
    inputs = {**forward.inputs, **request.outputs(lambda: forward.call("auto"))}
    shared = _compressed_lengths(request)

    def compute(t: Mapping[str, Tensor], impl: str) -> tuple[Tensor, ...]:
        return nsa_triton.nsa_compress_attention_grad(
            t["g"], t["q"], t["k"], t["v"], t["out"], t["softmax_max"], t["softmax_sum"], shape.key_dim**-0.5,
            shape.heads, shape.window, shape.stride, **shared, impl=impl,
        )  # fmt: skip

    flops = _backward_flops(shape, _visible_windows(request))
    moved = _bytes(*inputs.values()) + _bytes(*forward.inputs.values())
    return request.workload(inputs, compute, flops=flops, bytes=moved)


def _compressed_lengths(request: _Request) -> dict[str, Any]:
    query_ends, key_ends = request.ends(request.tokens), request.ends(request.windows)
    return {"actual_seq_qlen": query_ends, "actual_cmp_seq_kvlen": key_ends, "causal": True}


def _visible_windows(request: _Request) -> int:
    """Pairs of a query token and a window that ends at or before it, of all sequences."""
    shape, n = request.shape, request.windows
    each = n * (request.tokens - shape.window + 1) - shape.stride * n * (n - 1) // 2
    return request.batch * shape.kv_heads * each


def _compress_attention_infer(request: _Request) -> Workload:
    shape, batch = request.shape, request.batch
    inputs = {"q": request.tensor(batch, shape.heads, shape.key_dim), **request.paged(request.windows)}

    def compute(t: Mapping[str, Tensor], impl: str) -> tuple[Tensor, ...]:
        return nsa_triton.nsa_compress_attention_infer(
            t["q"], t["k"], t["v"], *_decoding_sizes(shape), shape.window, shape.stride, block_table=t["table"],
            actual_cmp_seq_kvlen=[request.windows] * batch, impl=impl,
        )  # fmt: skip

    pairs = batch * shape.kv_heads * request.windows
    ids = 4 * batch * shape.kv_heads * shape.count
    moved = _decoded_elements(shape, batch, pairs) * request.dtype.itemsize + ids
    return request.workload(inputs, compute, flops=_forward_flops(shape, pairs), bytes=moved)


# ---- attention over selected blocks ----


def _select_attention(request: _Request) -> Workload:
    shape, ids, chosen = request.shape, *_selection(request, request.tokens)
    inputs = {**request.packed(request.tokens), "ids": ids.flatten(0, 1)}
    sizes, shared = _training_sizes(shape), _selected_lengths(request)

    def compute(t: Mapping[str, Tensor], impl: str) -> tuple[Tensor, ...]:
        return nsa_triton.nsa_select_attention(t["q"], t["k"], t["v"], t["ids"], *sizes, **shared, impl=impl)

    rows, size = request.batch * request.tokens * shape.heads, request.dtype.itemsize
    read = _bytes(inputs["q"], ids) + chosen.rows * (shape.key_dim + shape.value_dim) * size
    return request.workload(
        inputs,
        compute,
        flops=_forward_flops(shape, chosen.pairs),
        bytes=read + rows * (shape.value_dim * size + 2 * 4 * 8),
        live_blocks=chosen.live_blocks,
        fills=LISTS,
    )


def _select_attention_grad(request: _Request) -> Workload:
    shape, forward = request.shape, _select_attention(request)
    inputs = {**forward.inputs, **request.outputs(lambda: forward.call("auto"))}
    sizes, shared = _training_sizes(shape), _selected_lengths(request)

    def compute(t: Mapping[str, Tensor], impl: str) -> tuple[Tensor, ...]:
        return nsa_triton.nsa_select_attention_grad(
            t["g"], t["q"], t["k"], t["v"], t["out"], t["softmax_max"], t["softmax_sum"], t["ids"], *sizes, **shared,
            impl=impl,
        )  # fmt: skip

    q, k, v = (inputs[name] for name in "qkv")
    # What the forward call moves, where its outputs are inputs now, then g and the three gradients.
    return request.workload(
        inputs,
        compute,
        flops=_backward_flops(request.shape, forward.flops // _forward_flops(request.shape, 1)),
        bytes=forward.bytes + _bytes(inputs["g"], q, k, v),
        live_blocks=forward.live_blocks,
        fills=forward.fills,
    )


def _select_attention_infer(request: _Request) -> Workload:
    shape, batch = request.shape, request.batch
    ids, chosen = _selection(request, 1)
    query = request.tensor(batch, 1, shape.heads, shape.key_dim)
    inputs = {"q": query, **request.paged(request.tokens), "ids": ids}

    def compute(t: Mapping[str, Tensor], impl: str) -> Any:
        return nsa_triton.nsa_select_attention_infer(
            t["q"], t["k"], t["v"], t["ids"], *_decoding_sizes(shape), block_table=t["table"],
            actual_seq_qlen=[1] * batch, actual_seq_kvlen=[request.tokens] * batch, impl=impl,
        )  # fmt: skip

    return request.workload(
        inputs,
        compute,
        flops=_forward_flops(shape, chosen.pairs),
        bytes=_decoded_elements(shape, batch, chosen.rows) * request.dtype.itemsize + _bytes(ids),
        live_blocks=chosen.live_blocks,
    )


def _selected_lengths(request: _Request) -> dict[str, Any]:
    ends = request.ends(request.tokens)
    return {"actual_seq_qlen": ends, "actual_seq_kvlen": ends, "causal": True}


def _training_sizes(shape: Shape) -> tuple[float, int, int, int]:
    return shape.key_dim**-0.5, shape.heads, shape.block, shape.count


def _decoding_sizes(shape: Shape) -> tuple[float, int, int, int, int, int]:
    return shape.key_dim**-0.5, shape.heads, shape.kv_heads, shape.block, shape.count, shape.page


def _forward_flops(shape: Shape, pairs: int) -> int:
    """Scores, and sums of values, for each pair of a key and a token of a kv head."""
    return 2 * pairs * shape.group * (shape.key_dim + shape.value_dim)


def _backward_flops(shape: Shape, pairs: int) -> int:
    """Scores again, gradients of the weights, of queries, keys and values."""
    return 2 * pairs * shape.group * (3 * shape.key_dim + 2 * shape.value_dim)


def _decoded_elements(shape: Shape, batch: int, rows: int) -> int:
    """Queries and outputs of one token per sequence, and so many rows of keys and values."""
    return (batch * shape.heads + rows) * (shape.key_dim + shape.value_dim)


# ---- attention over the newest tokens ----


def _sliding_window_attention(request: _Request) -> Workload:
    shape, inputs = request.shape, request.packed(request.tokens)
    ends = request.ends(request.tokens)
    sizes = (shape.key_dim**-0.5, shape.heads, shape.local)

    def compute(t: Mapping[str, Tensor], impl: str) -> tuple[Tensor, ...]:
        return nsa_triton.nsa_sliding_window_attention(
            t["q"], t["k"], t["v"], *sizes, actual_seq_qlen=ends, actual_seq_kvlen=ends, impl=impl
        )

    rows = request.batch * request.tokens * shape.heads
    return request.workload(
        inputs,
        compute,
        flops=_forward_flops(shape, _visible_tokens(request)),
        bytes=_bytes(*inputs.values()) + rows * (shape.value_dim * request.dtype.itemsize + 4),
    )


def _sliding_window_attention_grad(request: _Request) -> Workload:
    shape, forward = request.shape, _sliding_window_attention(request)
    ends = request.ends(request.tokens)
    sizes = (shape.key_dim**-0.5, shape.heads, shape.local)
    size = (request.batch * request.tokens, shape.heads)
    grad = request.tensor(*size, shape.value_dim)
    out, lse = request.tensor(*size, shape.value_dim), torch.empty(size, device=request.device)
    if request.filled:
        out, lse = forward.call("auto")
    inputs = {**forward.inputs, "g": grad, "out": out, "lse": lse}

    def compute(t: Mapping[str, Tensor], impl: str) -> tuple[Tensor, ...]:
        return nsa_triton.nsa_sliding_window_attention_grad(
            t["g"], t["q"], t["k"], t["v"], t["out"], t["lse"], *sizes, actual_seq_qlen=ends, actual_seq_kvlen=ends,
            impl=impl,
        )  # fmt: skip

    flops = _backward_flops(shape, _visible_tokens(request))
    moved = _bytes(*inputs.values()) + _bytes(*forward.inputs.values())
    return request.workload(inputs, compute, flops=flops, bytes=moved)


def _visible_tokens(request: _Request) -> int:
    """Pairs of a query token and a token of its window, of all sequences and kv heads."""
    tokens, first = request.tokens, min(request.tokens, request.shape.local)  # so many windows are cut by the beginning
    each = first * (first + 1) // 2 + (tokens - first) * request.shape.local
    return request.batch * request.shape.kv_heads * each


def _sliding_window_attention_infer(request: _Request) -> Workload:
    shape, batch = request.shape, request.batch
    inputs = {"q": request.tensor(batch, 1, shape.heads, shape.key_dim), **request.paged(request.tokens)}
    sizes = (shape.key_dim**-0.5, shape.heads, shape.kv_heads, shape.local, shape.page)

    def compute(t: Mapping[str, Tensor], impl: str) -> Any:
        return nsa_triton.nsa_sliding_window_attention_infer(
            t["q"], t["k"], t["v"], *sizes, block_table=t["table"],
            actual_seq_qlen=[1] * batch, actual_seq_kvlen=[request.tokens] * batch, impl=impl,
        )  # fmt: skip

    pairs = batch * shape.kv_heads * min(shape.local, request.tokens)
    moved = _decoded_elements(shape, batch, pairs) * request.dtype.itemsize
    return request.workload(inputs, compute, flops=_forward_flops(shape, pairs), bytes=moved)


# ---- the gated sum of the branches ----


def _gated_combine(request: _Request) -> Workload:
    inputs = _to_combine(request)

    def compute(t: Mapping[str, Tensor], impl: str) -> Tensor:
        return nsa_triton.nsa_gated_combine(t["compressed"], t["selected"], t["local"], t["gates"], impl=impl)

    branch = inputs["compressed"]
    # Three products and two sums for each element.
    return request.workload(inputs, compute, flops=5 * branch.numel(), bytes=_bytes(*inputs.values(), branch))


def _gated_combine_grad(request: _Request) -> Workload:
    forward = _to_combine(request)
    branch = forward["compressed"]
    inputs = {**forward, "g": request.tensor(*branch.shape)}

    def compute(t: Mapping[str, Tensor], impl: str) -> tuple[Tensor, ...]:
        branches = (t["compressed"], t["selected"], t["local"])
        return nsa_triton.nsa_gated_combine_grad(t["g"], *branches, t["gates"], impl=impl)

    # For each element of a branch its gradient, and a product that is added to the gradient of the gate.
    moved = _bytes(*inputs.values()) + _bytes(*forward.values())
    return request.workload(inputs, compute, flops=3 * 3 * branch.numel(), bytes=moved)


def _to_combine(request: _Request) -> dict[str, Tensor]:
    shape, rows = request.shape, (request.batch * request.tokens, request.shape.heads)
    branches = {name: request.tensor(*rows, shape.value_dim) for name in ("compressed", "selected", "local")}
    return {**branches, "gates": request.tensor(*rows, 3)}


# ---- which blocks are selected ----


@dataclass(frozen=True)
class _Chosen:
    """`pairs`: of a query token with a kv head, and a token that it sees there. `rows`: keys that anyone sees."""

    pairs: int
    rows: int
    live_blocks: float


def _selection(request: _Request, queries: int) -> tuple[Tensor, _Chosen]:
    """The ids [B, queries, N2, K] of the newest query tokens of each sequence, and what they come to."""
    shape, tokens = request.shape, request.tokens
    generator = torch.Generator().manual_seed(request.seed)  # of the CPU: the same ids on every device
    draw = _DECODING[request.indices] if queries == 1 else _TRAINING[request.indices]
    ids = torch.stack([draw(shape, tokens, generator) for _ in range(request.batch)])
    own = torch.arange(tokens - queries, tokens)
    return ids.to(request.device), _chosen(ids, own, shape, shape.blocks(tokens))


def _chosen(ids: Tensor, own: Tensor, shape: Shape, blocks: int) -> _Chosen:
    begins = ids.long() * shape.block
    seen = (own.view(-1, 1, 1) + 1 - begins).clamp(0, shape.block).masked_fill(ids < 0, 0)
    reach = seen.new_zeros((ids.shape[0], shape.kv_heads, blocks))  # how much of each block anyone sees
    place, length = (tensor.transpose(1, 2).flatten(2) for tensor in (ids.long().clamp_min(0), seen))
    reach.scatter_reduce_(2, place, length, "amax")
    return _Chosen(int(seen.sum()), int(reach.sum()), float((seen > 0).sum(-1).double().mean()))


def _random_blocks(shape: Shape, tokens: int, generator: torch.Generator) -> Tensor:
    """Any blocks up to that of the token itself, in any order."""
    found = []
    for own in torch.split(torch.arange(tokens) // shape.block, 1024):
        noise = torch.rand(len(own), shape.kv_heads, shape.blocks(tokens), generator=generator)
        found.append(_best(noise, own, shape))
    return torch.cat(found)


def _scored_blocks(shape: Shape, tokens: int, generator: torch.Generator) -> Tensor:
    """The first block, that of the token and the one before, and others of its past. Runs of eight tokens choose the
    same ones, as neighbours with similar queries do."""
    own = torch.arange(0, tokens, RUN) // shape.block
    blocks = torch.arange(shape.blocks(tokens))
    noise = torch.rand(len(own), shape.kv_heads, len(blocks), generator=generator)
    forced = (blocks == 0) | ((blocks <= own[:, None]) & (blocks > own[:, None] - 2))
    noise[forced[:, None].expand_as(noise)] = 2
    return _best(noise, own, shape).repeat_interleave(RUN, 0)[:tokens]


def _best(noise: Tensor, own: Tensor, shape: Shape) -> Tensor:
    """The blocks with the most noise [T, N2, blocks] among those up to `own` [T], then -1."""
    blocks = noise.shape[-1]
    noise[(torch.arange(blocks) > own[:, None])[:, None].expand_as(noise)] = -1
    found = noise.sort(dim=-1, descending=True, stable=True)
    return _filled_up(torch.where(found.values >= 0, found.indices, -1), shape.count)


def _local_blocks(shape: Shape, tokens: int, generator: torch.Generator) -> Tensor:
    """The block of the token itself and those before it."""
    own = torch.arange(tokens) // shape.block
    ids = (own[:, None] - torch.arange(shape.count)).clamp_min(-1).int()
    return ids[:, None].repeat(1, shape.kv_heads, 1)


def _filled_up(ids: Tensor, count: int) -> Tensor:
    """`count` ids, with -1 for those that there are not."""
    ids = ids[..., :count].int()
    return torch.nn.functional.pad(ids, (0, count - ids.shape[-1]), value=-1)


def _newest(choose: Callable[[int, int, torch.Generator], Tensor]) -> Callable[..., Tensor]:
    """The ids [1, N2, K] of the newest token, where `choose` makes those of one kv head."""

    def draw(shape: Shape, tokens: int, generator: torch.Generator) -> Tensor:
        rows = [choose(shape.blocks(tokens), shape.count, generator) for _ in range(shape.kv_heads)]
        return torch.stack([_filled_up(row, shape.count) for row in rows])[None]

    return draw


def _newest_random(blocks: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(blocks, generator=generator)


def _newest_scored(blocks: int, count: int, generator: torch.Generator) -> Tensor:
    """The first block, the newest two, and others between them."""
    forced = torch.tensor(sorted({0, max(blocks - 2, 0), blocks - 1}))
    others = torch.randperm(max(blocks - 3, 0), generator=generator)[: max(count - 3, 0)] + 1
    return torch.cat((forced, others))


def _newest_local(blocks: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.arange(blocks - 1, -1, -1)


_TRAINING = {"random": _random_blocks, "scores": _scored_blocks, "local": _local_blocks}
_DECODING = {"random": _newest(_newest_random), "scores": _newest(_newest_scored), "local": _newest(_newest_local)}
_BUILDERS: dict[str, Callable[[_Request], Workload]] = {
    "nsa_compress": _compress,
    "nsa_compress_grad": _compress_grad,
    "nsa_compress_attention": _compress_attention,
    "nsa_compress_attention_grad": _compress_attention_grad,
    "nsa_select_attention": _select_attention,
    "nsa_select_attention_grad": _select_attention_grad,
    "nsa_gated_combine": _gated_combine,
    "nsa_gated_combine_grad": _gated_combine_grad,
    "nsa_compress_infer": _compress_infer,
    "nsa_compress_attention_infer": _compress_attention_infer,
    "nsa_select_attention_infer": _select_attention_infer,
    "nsa_sliding_window_attention": _sliding_window_attention,
    "nsa_sliding_window_attention_grad": _sliding_window_attention_grad,
    "nsa_sliding_window_attention_infer": _sliding_window_attention_infer,
}
OPS = tuple(_BUILDERS)
