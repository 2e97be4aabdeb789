"""Every op family of the package: what the command line, the README's tables and the tests iterate over."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from nsa_triton.errors import ArgumentValueError
from nsa_triton.ops._common.cases import CheckCase, CompileCase


@dataclass(frozen=True)
class Op:
    """A public function: its vendor twin, and what the support matrix says of it."""

    name: str
    vendor: str
    does: str
    dtypes: str
    differentiable: str
    beyond: str  # what it takes that CANN does not


@dataclass(frozen=True)
class Family:
    """One folder under ops/. Its cases.py declares what to check and to compile."""

    name: str
    ops: tuple[Op, ...]

    def check_cases(self, device: torch.device) -> Iterator[CheckCase]:
        cases: Iterator[CheckCase] = self._cases().check_cases(device)
        return cases

    def compile_cases(self) -> Iterator[CompileCase]:
        cases: Iterator[CompileCase] = self._cases().compile_cases()
        return cases

    def _cases(self) -> ModuleType:
        return importlib.import_module(f"nsa_triton.ops.{self.name}.cases")


FAMILIES = (
    Family(
        "compress",
        (
            Op(
                "nsa_compress",
                "npu_nsa_compress",
                "weighted sums over overlapping windows, ragged batches",
                "fp16, bf16, fp32",
                "input, weight (twice)",
                "fp32; empty and short segments; any strides; every Ascend product, CUDA and CPU",
            ),
            Op(
                "nsa_compress_grad",
                "npu_nsa_compress_grad",
                "both gradients of nsa_compress, bit-identical on repeat",
                "fp16, bf16, fp32",
                "grad, input, weight",
                "the same",
            ),
        ),
    ),
    Family(
        "compress_infer",
        (
            Op(
                "nsa_compress_infer",
                "npu_nsa_compress_infer",
                "the windows that the newest tokens complete, from a paged cache into compressed slots, in place",
                "fp16, bf16, fp32",
                "–",
                "several new tokens; any page; lengths on the device; packed input; bad slots are skipped",
            ),
        ),
    ),
    Family(
        "compress_attention",
        (
            Op(
                "nsa_compress_attention",
                "npu_nsa_compress_attention",
                "attention over compressed tokens, ragged batches, and the ids of the best blocks",
                "fp16, bf16, fp32",
                "query, key, value",
                "head sizes up to 512; any groups and lengths; causality and forced blocks without masks; tokens that "
                "see nothing give 0; true overlap scores; memory that is linear in tokens",
            ),
            Op(
                "nsa_compress_attention_grad",
                "–",
                "the three gradients of nsa_compress_attention, bit-identical on repeat",
                "fp16, bf16, fp32",
                "–",
                "the same",
            ),
        ),
    ),
    Family(
        "compress_attention_infer",
        (
            Op(
                "nsa_compress_attention_infer",
                "npu_nsa_compress_attention_infer",
                "attention over a paged cache of compressed tokens, and the ids of the best blocks",
                "fp16, bf16, fp32",
                "–",
                "head sizes up to 512; any groups, pages and lengths; true overlap scores; lengths on the device; "
                "keys are read once; small batches fill all cores",
            ),
        ),
    ),
    Family(
        "select_attention",
        (
            Op(
                "nsa_select_attention",
                "npu_nsa_select_attention",
                "attention of packed sequences over selected blocks of keys, causal or not",
                "fp16, bf16, fp32",
                "query, key, value",
                "head sizes up to 512; any groups and counts; empty segments and cut blocks; bad ids are skipped; "
                "causal without a mask; every Ascend product, CUDA and CPU",
            ),
            Op(
                "nsa_select_attention_grad",
                "npu_nsa_select_attention_grad",
                "the three gradients of nsa_select_attention, bit-identical on repeat",
                "fp16, bf16, fp32",
                "–",
                "the same; also the gradient of full attention",
            ),
        ),
    ),
    Family(
        "select_attention_infer",
        (
            Op(
                "nsa_select_attention_infer",
                "npu_nsa_select_attention_infer",
                "attention over selected blocks of a paged cache, one or several query tokens",
                "fp16, bf16, fp32",
                "–",
                "ids per kv head; head sizes up to 512; any groups and pages; lengths on the device; log-sum-exp; "
                "small batches fill all cores",
            ),
        ),
    ),
    Family(
        "sliding_window_attention",
        (
            Op(
                "nsa_sliding_window_attention",
                "–",
                "causal attention of packed sequences over the newest keys before each query token",
                "fp16, bf16, fp32",
                "query, key, value",
                "CANN has no such operator; any window, head sizes, groups and lengths; later chunks of a prompt; "
                "log-sum-exp",
            ),
            Op(
                "nsa_sliding_window_attention_grad",
                "–",
                "the three gradients of nsa_sliding_window_attention, bit-identical on repeat",
                "fp16, bf16, fp32",
                "–",
                "the same",
            ),
        ),
    ),
    Family(
        "sliding_window_attention_infer",
        (
            Op(
                "nsa_sliding_window_attention_infer",
                "–",
                "attention over the newest tokens of a paged cache, one or several query tokens",
                "fp16, bf16, fp32",
                "–",
                "CANN has no such operator; any window, head sizes, groups and pages; old pages may be gone; lengths "
                "on the device; log-sum-exp; small batches fill all cores",
            ),
        ),
    ),
    Family(
        "gated_combine",
        (
            Op(
                "nsa_gated_combine",
                "–",
                "the sum of the three branches, each weighted by the sigmoid of its gate, in one launch",
                "fp16, bf16, fp32",
                "compressed, selected, local, gates",
                "CANN has no such operator; any head sizes, strides and leading dimensions; gates in fp32",
            ),
            Op(
                "nsa_gated_combine_grad",
                "–",
                "the four gradients of nsa_gated_combine in one launch, bit-identical on repeat",
                "fp16, bf16, fp32",
                "–",
                "the same",
            ),
        ),
    ),
)


def families(names: list[str]) -> tuple[Family, ...]:
    """The named families, or all of them; a function's name finds its family too."""
    if not names:
        return FAMILIES
    found = []
    for name in names:
        fitting = [family for family in FAMILIES if name in (family.name, *(op.name for op in family.ops))]
        if not fitting:
            known = ", ".join(f"{family.name} ({', '.join(op.name for op in family.ops)})" for family in FAMILIES)
            raise ArgumentValueError("op", f"one of {known}", repr(name))
        found += [family for family in fitting if family not in found]
    return tuple(found)
