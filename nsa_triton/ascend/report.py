"""What one compile of one kernel for one chip came to: a CompileReport, and the verdict that it supports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nsa_triton.ascend.chips import UB_LIMIT, chip
from nsa_triton.ascend.hivm_facts import ModuleFacts, Place, ScalarAccess


@dataclass(frozen=True)
class Overflow:
    """A memory that a kernel does not fit into: what it needs and what there is, in bytes."""

    memory: str
    required: int
    available: int

    def __str__(self) -> str:
        return f"{self.memory} overflow: {self.required} bytes needed, {self.available} there"


@dataclass(frozen=True, kw_only=True)
class CompileReport(ModuleFacts):
    """One kernel, made concrete, compiled for one chip by one compiler.

    `fits` says that the compiler planned all memories and made the final module. The fields of ModuleFacts come from
    that module and are empty where there is none, as is `program`, its digest: options that leave it as it is change
    nothing. On a machine without a real `hivmc` the compile ends there, and `object_file` is "".
    """

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    chip: str
    compiler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ub_limit: int = UB_LIMIT  # percent
    mix_mode: str = ""
    seconds: float = 0.0
    fits: bool = False
    overflow: Overflow | None = None
    error: str = ""
    notes: tuple[str, ...] = ()
    scalar_warnings: tuple[Place, ...] = ()
    double_buffer_dropped: bool = False
    object_file: str = ""
    program: str = ""

    @property
    def ok(self) -> bool:
        """The kernel compiles and fits. Whether it is also fast is what `problems()` says."""
        return self.fits and not self.error

    @property
    def label(self) -> str:
        """Kernel, type of its first tensor, constexprs."""
        types = [kind[1:] for kind in self.signature.values() if kind.startswith("*")]
        return " ".join([self.kernel, *types[:1], *(f"{name}={value}" for name, value in self.constexprs.items())])

    def percent(self, memory: str) -> float:
        """The used share of memory "UB", "L1", "L0A", "L0B" or "L0C" of this chip."""
        return 100 * self.used[memory] / chip(self.chip).memory(memory)

    @property
    def ub_percent(self) -> float:
        return self.percent("UB")

    @property
    def fills_ub(self) -> bool:
        """More of the unified buffer is used than the config allows."""
        return self.ub_percent > self.ub_limit

    def total(self, kind: str) -> int:
        """How many instructions of kind "vector", "cube", "dma" or "sync" the module holds."""
        return sum(self.counts[kind].values())

    def scalar_fallbacks(self, allow_gm: bool = True) -> list[ScalarAccess]:
        """The scalar accesses that count as a failure: elements of tiles, in a loop.

        Scalar accesses to global memory are page ids, lengths and scalar results; `allow_gm=False` also returns those
        in loops.
        """
        kinds = {"element", "row"} if allow_gm else {"element", "row", "gm"}
        return [access for access in self.scalar_accesses if access.in_loop and access.kind in kinds]

    def problems(self) -> list[str]:
        """Everything that speaks against shipping this kernel with this config, each with what to do about it."""
        if not self.fits:
            return [self._failure()]
        found = [] if not self.error else [f"The back end failed after the memory plan: {self.error}"]
        return found + self._scalar_problems() + self._mask_problems() + self._memory_problems()

    def remarks(self) -> list[str]:
        """What costs time but may be the kernel's business."""
        return [
            f"{_line(place)}: {place.what} moves each element by itself, because the last axis is strided in global "
            "memory: make that axis contiguous, or load it naturally and use tl.trans"
            for place in self.element_transfers
        ]

    def to_json(self) -> dict[str, Any]:
        """A plain dict of numbers, strings, lists and dicts."""
        plain = {name: _plain(value) for name, value in dataclasses.asdict(self).items()}
        verdict = {"ok": self.ok, "problems": self.problems(), "remarks": self.remarks()}
        return {**plain, "ub_percent": round(self.ub_percent, 1), **verdict}

    def _failure(self) -> str:
        if self.overflow is None:
            return f"Does not compile: {self.error}"
        advice = {
            "UB": "lower the BLOCK_ tiles, or keep fewer fp32 tiles alive at once",
            "L1": "lower BLOCK_K or the tiles that feed the dots",
            "L0C": "lower BLOCK_M or BLOCK_N: a dot's fp32 result of M x N must fit",
        }
        return f"{self.overflow}: {advice.get(self.overflow.memory, 'lower the BLOCK_ tiles')}"

    def _scalar_problems(self) -> list[str]:
        warned = {warning.source for warning in self.scalar_warnings}
        found = [
            f"{_line(warning)}: {warning.what} runs by scalar instructions: use an operation and a type (fp32, fp16, "
            "i32) that the vector unit has"
            for warning in self.scalar_warnings
        ]
        found += [
            f"{_line(place)}: {place.what} works element by element: use another operation or type, or make the "
            "last axis contiguous"
            for place in self.scalar_templates
        ]
        for (source, kind), memories in self._fallbacks_by_line().items():
            what = f"{source or 'unknown line'}: single elements of {memories} are accessed in a loop"
            if kind == "row":
                found.append(f"{what}: load such values from global memory as scalars, or work on whole tiles")
            elif source not in warned:
                found.append(f"{what}: the tile operation there has no vector form, use another type or operation")
        locks = self.counts["sync"].get("sync_block_lock", 0)
        if locks:
            found.append("Blocks wait for one another at a lock: do not use the value that an atomic returns")
        return found

    def _fallbacks_by_line(self) -> dict[tuple[str, str], str]:
        """For each source line and kind of scalar fallback, the memories that are accessed."""
        lines: dict[tuple[str, str], list[str]] = {}
        for access in self.scalar_fallbacks():
            lines.setdefault((access.source, access.kind), []).append(access.memory)
        return {line: " and ".join(dict.fromkeys(memories)) for line, memories in lines.items()}

    def _mask_problems(self) -> list[str]:
        effect = {
            "tl.load": "reads the whole tile, also outside of the tensor",
            "tl.store": "reads, changes and writes back the whole tile, so that neighbouring programs race",
        }
        return [
            f"{_line(place)}: the mask of {place.what} is not structured, so that it {effect[place.what]}: write it as "
            "`index < n` with the index on the left, or `&` of such terms"
            for place in self.unstructured_masks
        ]

    def _memory_problems(self) -> list[str]:
        found = []
        if self.double_buffer_dropped:
            found.append(
                "Double buffering was dropped to make the kernel fit, so that copies do not overlap with computing: "
                "lower the BLOCK_ tiles to half, or pass multibuffer=False to say that this is meant"
            )
        if self.fills_ub:
            found.append(f"UB is {self.ub_percent:.0f} % full (limit {self.ub_limit} %): lower the BLOCK_ tiles")
        return found


def _line(place: Place) -> str:
    return place.source or "unknown line"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
