"""What is timed against what: each provider makes the call that the clock is held to.

ours       the Triton kernels
reference  the specification in plain PyTorch
sdpa       dense causal attention, torch's scaled_dot_product_attention, over all tokens: what sparse attention replaces
torch_npu  CANN's closed operator, where torch_npu has it

simulated and roofline call nothing: simulator and arithmetic give their figures; see run.py.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsa_triton.workloads import Workload

from .vendor import vendor_call

Call = Callable[[], Any]
SAME_RESULT = ("ours", "torch_npu")  # pass the gate; `reference` is the gate, and `sdpa` computes another thing


def call_of(provider: str, work: Workload) -> Call | None:
    """None where this provider has no such operator."""
    if provider == "ours":
        return functools.partial(work.call, "triton")
    if provider == "reference":
        return functools.partial(work.call, "reference")
    if provider == "sdpa":
        return dense_attention(work)
    return vendor_call(work, importlib.import_module("torch_npu"))


def has_torch_npu() -> bool:
    return importlib.util.find_spec("torch_npu") is not None


def dense_attention(work: Workload) -> Call:
    """Over all tokens of each sequence, also where the workload has compressed ones. Of a gradient the backward pass
    only."""
    decodes = work.op.endswith("_infer")
    shape, q = work.shape, work.inputs["q"]
    queries = q.view(work.batch, -1, shape.heads, shape.key_dim).transpose(1, 2)
    generator = torch.Generator(q.device).manual_seed(1)

    def tokens(size: int) -> Tensor:
        rows = (work.batch, shape.kv_heads, work.tokens, size)
        return torch.randn(rows, dtype=q.dtype, device=q.device, generator=generator)

    k, v = tokens(shape.key_dim), tokens(shape.value_dim)
    attend: Any = functools.partial(scaled_dot_product_attention, is_causal=not decodes, enable_gqa=True)
    if not work.op.endswith("_grad"):
        return lambda: attend(queries, k, v)
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (queries, k, v))
    grad = work.inputs["g"].view(work.batch, -1, shape.heads, shape.value_dim).transpose(1, 2)
    out: Tensor = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
