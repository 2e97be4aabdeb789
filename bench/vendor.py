"""The same calls as torch_npu spells them: the closed operators of CANN on the inputs of a workload.

Where CANN wants masks, these are made from what the workload says. tests/bench/test_vendor.py calls the functions of
nsa_triton.vendor in their place, which have the same arguments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_triton.workloads import Workload

MASK = 2048  # side of a causal mask whose values CANN does not look at


def vendor_call(work: Workload, torch_npu: Any) -> Callable[[], Any] | None:
    """None where `torch_npu` has no such operator."""
    function = getattr(torch_npu, f"npu_{work.op}", None)
    if function is None or work.op not in _CALLS:
        return None
    positional, named = _CALLS[work.op](work)
    return lambda: function(*positional, **named)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _ends(work: Workload, each: int) -> list[int]:
    return list(itertools.accumulate([each] * work.batch))


def _tensors(work: Workload, *names: str) -> tuple[Tensor, ...]:
    return tuple(work.inputs[name] for name in names)


def _compress(work: Workload) -> Arguments:
    sizes = (work.shape.window, work.shape.stride)
    return (*_tensors(work, "x", "w"), *sizes), {"actual_seq_len": _ends(work, work.tokens)}


def _compress_grad(work: Workload) -> Arguments:
    sizes = (work.shape.window, work.shape.stride)
    return (*_tensors(work, "g", "x", "w"), *sizes), {"actual_seq_len": _ends(work, work.tokens)}


def _compress_infer(work: Workload) -> Arguments:
    shape, x = work.shape, work.inputs["x"]
    cache = torch.zeros((work.batch, *x.shape[2:]), dtype=x.dtype, device=x.device)
    sizes = (shape.window, shape.stride, shape.page)
    lengths = {"actual_seq_len": [work.tokens] * work.batch}
    return (*_tensors(work, "x", "w", "slots"), *sizes), {
        "block_table": work.inputs["table"],
        **lengths,
        "cache": cache,
    }


def _compress_attention(work: Workload) -> Arguments:
    shape, device = work.shape, work.inputs["q"].device
    windows = shape.windows(work.tokens)
    token, window = torch.arange(work.tokens, device=device)[:, None], torch.arange(windows, device=device)
    own, block = token // shape.block, torch.arange(-(-windows * shape.stride // shape.block), device=device)
    masks = {
        "atten_mask": window * shape.stride + shape.window - 1 > token,
        "topk_mask": (block == 0) | ((block <= own) & (block > own - 2)),
    }
    lengths = {"actual_seq_qlen": _ends(work, work.tokens), "actual_cmp_seq_kvlen": _ends(work, windows)}
    sizes = (shape.key_dim**-0.5, shape.heads, shape.window, shape.stride, shape.block, shape.count)
    return (*_tensors(work, "q", "k", "v"), *sizes), {**masks, **lengths}


def _compress_attention_infer(work: Workload) -> Arguments:
    lengths = {"actual_cmp_seq_kvlen": [work.shape.windows(work.tokens)] * work.batch}
    sizes = (*_decoding_sizes(work), work.shape.window, work.shape.stride)
    return (*_tensors(work, "q", "k", "v"), *sizes), {"block_table": work.inputs["table"], **lengths}


def _select_attention(work: Workload) -> Arguments:
    return (*_tensors(work, "q", "k", "v", "ids"), *_training_sizes(work)), _causal(work)


def _select_attention_grad(work: Workload) -> Arguments:
    tensors = _tensors(work, "g", "q", "k", "v", "out", "softmax_max", "softmax_sum", "ids")
    return (*tensors, *_training_sizes(work)), _causal(work)


def _select_attention_infer(work: Workload) -> Arguments:
    lengths = {"actual_seq_qlen": [1] * work.batch, "actual_seq_kvlen": [work.tokens] * work.batch}
    tensors = _tensors(work, "q", "k", "v", "ids")
    return (*tensors, *_decoding_sizes(work)), {"block_table": work.inputs["table"], **lengths}


def _causal(work: Workload) -> dict[str, Any]:
    side, device = min(MASK, work.tokens), work.inputs["q"].device
    ends = _ends(work, work.tokens)
    mask = torch.ones((side, side), dtype=torch.bool, device=device).triu(1)
    return {"atten_mask": mask, "actual_seq_qlen": ends, "actual_seq_kvlen": ends}


def _training_sizes(work: Workload) -> tuple[float, int, int, int]:
    shape = work.shape
    return shape.key_dim**-0.5, shape.heads, shape.block, shape.count


def _decoding_sizes(work: Workload) -> tuple[float, int, int, int, int, int]:
    shape = work.shape
    return shape.key_dim**-0.5, shape.heads, shape.kv_heads, shape.block, shape.count, shape.page


_CALLS: dict[str, Callable[[Workload], Arguments]] = {
    "nsa_compress": _compress,
    "nsa_compress_grad": _compress_grad,
    "nsa_compress_infer": _compress_infer,
    "nsa_compress_attention": _compress_attention,
    "nsa_compress_attention_infer": _compress_attention_infer,
    "nsa_select_attention": _select_attention,
    "nsa_select_attention_grad": _select_attention_grad,
    "nsa_select_attention_infer": _select_attention_infer,
}
