"""The gate before the clock: a result must be no further from float64 than that of eager PyTorch in the same dtype.

What is judged, and how, is what `nsa-triton check` judges: ids of blocks by the scores that they stand for, because
another order of summation may exchange equal ones.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_triton.ops._common.accuracy import Accuracy, judge
from nsa_triton.ops._common.block_scores import scores_at
from nsa_triton.ops.compress_attention import reference as compress_attention
from nsa_triton.ops.compress_attention_infer import reference as compress_attention_infer
from nsa_triton.ops.select_attention import reference as select_attention
from nsa_triton.ops.select_attention_infer import reference as select_attention_infer
from nsa_triton.ops.sliding_window_attention import reference as sliding_window_attention
from nsa_triton.ops.sliding_window_attention_infer import reference as sliding_window_attention_infer
from nsa_triton.workloads import Workload

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Gate:
    """What a result of one workload is held against. `comparable` makes of a result what is judged."""

    expected: Tensors
    eager: Tensors
    terms: tuple[int, ...]  # products summed per element of each output
    comparable: Callable[[Any], Tensors]

    def worst(self, result: Any) -> Accuracy:
        """That of the output which comes closest to its limit, or passes it by most."""
        outputs = zip(self.comparable(result), self.eager, self.expected, self.terms, strict=True)
        found = [judge(ours, eager, truth, terms=terms) for ours, eager, truth, terms in outputs]
        return max(found, key=_share_of_limit)


def _share_of_limit(one: Accuracy) -> float:
    if math.isnan(one.rms_error):
        return math.inf
    return one.rms_error / one.limit if one.limit else 0.0  # a limit of 0 is that of nothing


def gate(work: Workload) -> Gate:
    """Computes the truth in float64, which takes a while."""
    return _GATES[work.op](work)


def _as_tuple(result: Any) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


def _doubles(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics of a softmax are given in float32, whatever the dtype."""
    is_data = {name: t.is_floating_point() and not name.startswith("softmax") for name, t in inputs.items()}
    return {name: t.double() if is_data[name] else t for name, t in inputs.items()}


def _sums(work: Workload, *terms: int) -> Gate:
    """Sums are float32 in eager PyTorch too, so that it is the reference itself."""
    expected, eager = work.compute(_doubles(work.inputs), "reference"), work.call("reference")
    return Gate(_as_tuple(expected), _as_tuple(eager), terms, _as_tuple)


def _compress(work: Workload) -> Gate:
    return _sums(work, work.shape.window)


def _compress_grad(work: Workload) -> Gate:
    return _sums(work, work.shape.window, work.batch * work.tokens)


def _ends(work: Workload, each: int) -> tuple[int, ...]:
    return tuple(itertools.accumulate([each] * work.batch))


def _terms(work: Workload, keys: int) -> tuple[int, int]:
    """Of an output, or the gradient of a query, and of the gradient of a key."""
    size = work.shape.key_dim
    return size + keys, size + work.batch * work.tokens * work.shape.group


def _without_lowest(largest: Tensor, total: Tensor) -> Tensors:
    """The lowest float32, where nothing is seen, would drown all else."""
    return largest.masked_fill(total == 0, 0.0), total


def _compressed_geometry(work: Workload) -> Any:
    keys = work.shape.windows(work.tokens)
    ends = (_ends(work, work.tokens), _ends(work, keys))
    return (*ends, work.shape.key_dim**-0.5, work.shape.window, work.shape.stride)


def _compress_attention(work: Workload) -> Gate:
    shape, exact = work.shape, _doubles(work.inputs)
    geometry = _compressed_geometry(work)
    scored: Any = (*geometry, shape.block, True, "cann")
    known = compress_attention.scores(exact["q"], exact["k"], None, *scored)

    def comparable(result: Tensors) -> Tensors:
        out, ids, *statistics = result
        owned = torch.split(ids, work.tokens)
        scores = [scores_at(own, of_blocks) for own, of_blocks in zip(owned, known, strict=True)]
        return out, torch.cat(scores), *_without_lowest(*statistics)

    def forward(t: Mapping[str, Tensor]) -> Tensors:
        sizes: Any = (*geometry, shape.block, shape.count, True, 1, 2, "cann")
        found = compress_attention.forward(t["q"], t["k"], t["v"], None, None, *sizes, precision=t["q"].dtype)
        return comparable(found)

    terms, _ = _terms(work, shape.windows(work.tokens))
    return Gate(forward(exact), forward(work.inputs), (terms,) * 4, comparable)


def _compress_attention_grad(work: Workload) -> Gate:
    rest: Any = (None, *_compressed_geometry(work), True)  # no mask, causal

    def backward(t: Mapping[str, Tensor]) -> Tensors:
        given = (t["g"], t["q"], t["k"], t["v"], t["out"], t["softmax_max"], t["softmax_sum"])
        return compress_attention.backward(*given, *rest, precision=t["q"].dtype)

    terms, sums = _terms(work, work.shape.windows(work.tokens))
    return Gate(backward(_doubles(work.inputs)), backward(work.inputs), (terms, sums, sums), _as_tuple)


def _compress_attention_infer(work: Workload) -> Gate:
    shape, exact = work.shape, _doubles(work.inputs)
    lengths = torch.full((work.batch,), shape.windows(work.tokens), dtype=torch.int32)
    geometry: Any = (shape.key_dim**-0.5, shape.window, shape.stride, shape.block)
    scored: Any = (*geometry, "cann")

    def cached(t: Mapping[str, Tensor]) -> Any:
        return t["q"], t["k"], t["v"], t["table"], lengths.to(t["q"].device), None, None

    known = compress_attention_infer.scores(*cached(exact), *scored)

    def comparable(result: Tensors) -> Tensors:
        out, ids = result
        return out, torch.cat(
            [scores_at(own, of_blocks) for own, of_blocks in zip(torch.split(ids, 1), known, strict=True)]
        )

    def forward(t: Mapping[str, Tensor]) -> Tensors:
        sizes: Any = (*geometry, shape.count, "cann")
        return comparable(compress_attention_infer.forward(*cached(t), *sizes, precision=t["q"].dtype))

    terms, _ = _terms(work, shape.windows(work.tokens))
    return Gate(forward(exact), forward(work.inputs), (terms, terms), comparable)


def _selected_geometry(work: Workload) -> Any:
    ends = _ends(work, work.tokens)
    return ends, ends, work.shape.key_dim**-0.5, work.shape.block, True


def _select_attention(work: Workload) -> Gate:
    forward = functools.partial(_select_forward, work)

    def comparable(result: Tensors) -> Tensors:
        out, *statistics = result
        return out, *_without_lowest(*statistics)

    exact, plain = forward(_doubles(work.inputs)), forward(work.inputs)
    in_dtype = forward(work.inputs, precision=work.dtype)
    terms, _ = _terms(work, work.shape.count * work.shape.block)
    eager = (in_dtype[0], *plain[1:])  # statistics are float32 in any case
    return Gate(comparable(exact), comparable(eager), (terms,) * 3, comparable)


def _select_forward(work: Workload, t: Mapping[str, Tensor], precision: torch.dtype | None = None) -> Tensors:
    return select_attention.forward(t["q"], t["k"], t["v"], t["ids"], *_selected_geometry(work), precision=precision)


def _select_attention_grad(work: Workload) -> Gate:
    def backward(t: Mapping[str, Tensor]) -> Tensors:
        given = (t["g"], t["q"], t["k"], t["v"], t["out"], t["softmax_max"], t["softmax_sum"], t["ids"])
        return select_attention.backward(*given, *_selected_geometry(work), precision=t["q"].dtype)

    terms, sums = _terms(work, work.shape.count * work.shape.block)
    return Gate(backward(_doubles(work.inputs)), backward(work.inputs), (terms, sums, sums), _as_tuple)


def _gated_combine(work: Workload) -> Gate:
    return _sums(work, 3)


def _gated_combine_grad(work: Workload) -> Gate:
    return _sums(work, 1, 1, 1, work.shape.value_dim)


def _windowed_geometry(work: Workload) -> Any:
    ends = _ends(work, work.tokens)
    return ends, ends, work.shape.key_dim**-0.5, work.shape.local


def _sliding_window_attention(work: Workload) -> Gate:
    def forward(t: Mapping[str, Tensor], precision: torch.dtype | None = None) -> Tensors:
        return sliding_window_attention.forward(t["q"], t["k"], t["v"], *_windowed_geometry(work), precision=precision)

    plain, in_dtype = forward(work.inputs), forward(work.inputs, precision=work.dtype)
    terms, _ = _terms(work, work.shape.local)
    eager = (in_dtype[0], plain[1])  # the log-sum-exp is float32 in any case
    return Gate(forward(_doubles(work.inputs)), eager, (terms, terms), _as_tuple)


def _sliding_window_attention_grad(work: Workload) -> Gate:
    def backward(t: Mapping[str, Tensor]) -> Tensors:
        given = (t["g"], t["q"], t["k"], t["v"], t["out"], t["lse"])
        return sliding_window_attention.backward(*given, *_windowed_geometry(work), precision=t["q"].dtype)

    terms, sums = _terms(work, work.shape.local)
    return Gate(backward(_doubles(work.inputs)), backward(work.inputs), (terms, sums, sums), _as_tuple)


def _select_attention_infer(work: Workload) -> Gate:
    lengths = torch.full((work.batch,), work.tokens, dtype=torch.int32)

    def forward(t: Mapping[str, Tensor]) -> Tensors:
        q, ids = t["q"].flatten(0, 1), t["ids"].flatten(0, 1)
        cached = (q, t["k"], t["v"], ids, t["table"], lengths.to(q.device), None)
        out, _ = select_attention_infer.forward(*cached, work.shape.key_dim**-0.5, work.shape.block, precision=q.dtype)
        return (out,)

    def comparable(result: Any) -> Tensors:
        out = result[0] if isinstance(result, tuple) else result
        return (out.flatten(0, 1),)

    terms, _ = _terms(work, work.shape.count * work.shape.block)
    return Gate(forward(_doubles(work.inputs)), forward(work.inputs), (terms,), comparable)


def _sliding_window_attention_infer(work: Workload) -> Gate:
    lengths = torch.full((work.batch,), work.tokens, dtype=torch.int32)
    sizes = (work.shape.key_dim**-0.5, work.shape.local)

    def forward(t: Mapping[str, Tensor]) -> Tensors:
        q = t["q"].flatten(0, 1)
        cached = (q, t["k"], t["v"], t["table"], lengths.to(q.device), None)
        out, _ = sliding_window_attention_infer.forward(*cached, *sizes, precision=q.dtype)
        return (out,)

    def comparable(result: Any) -> Tensors:
        out = result[0] if isinstance(result, tuple) else result
        return (out.flatten(0, 1),)

    terms, _ = _terms(work, work.shape.local)
    return Gate(forward(_doubles(work.inputs)), forward(work.inputs), (terms,), comparable)


_GATES: dict[str, Callable[[Workload], Gate]] = {
    "nsa_compress": _compress,
    "nsa_compress_grad": _compress_grad,
    "nsa_compress_infer": _compress,
    "nsa_gated_combine": _gated_combine,
    "nsa_gated_combine_grad": _gated_combine_grad,
    "nsa_compress_attention": _compress_attention,
    "nsa_compress_attention_grad": _compress_attention_grad,
    "nsa_compress_attention_infer": _compress_attention_infer,
    "nsa_select_attention": _select_attention,
    "nsa_select_attention_grad": _select_attention_grad,
    "nsa_select_attention_infer": _select_attention_infer,
    "nsa_sliding_window_attention": _sliding_window_attention,
    "nsa_sliding_window_attention_grad": _sliding_window_attention_grad,
    "nsa_sliding_window_attention_infer": _sliding_window_attention_infer,
}
