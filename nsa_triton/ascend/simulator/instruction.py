"""An instruction of the final program, decoded once: which pipe runs it, its operands by role, its source line."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from nsa_triton.ascend.hivm_module import Op, memref

PIPES = ("S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX")
_NUMBERS = ("broadcast", "transpose", "reduce_dims", "permutation")
_PIPE_OF = {"load": "MTE2", "nd2nz": "MTE2", "store": "MTE3", "fixpipe": "FIX", "mmadL1": "M"}


@dataclass(eq=False, slots=True)
class Instruction:
    """`parts` cuts the operands into their roles: sources, targets, and what the op defines beyond them."""

    number: int
    name: str
    pipe: str
    attributes: dict[str, str]
    parts: tuple[slice, ...]
    source: str
    numbers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def flag(self, attribute: str) -> bool:
        return attribute in self.attributes and self.attributes[attribute] != "false"

    def __str__(self) -> str:
        return f"hivm.hir.{self.name}"


def decoded(op: Op, number: int) -> Instruction:
    name = op.short
    return Instruction(
        number=number,
        name=name,
        pipe=_pipe(op),
        attributes={key: _inner(value) for key, value in op.attributes.items()},
        parts=_parts(op),
        source=op.source,
        numbers={key: op.numbers(key) for key in _NUMBERS if key in op.attributes},
    )


def _inner(text: str) -> str:
    """`#hivm.pipe<PIPE_V>` is PIPE_V."""
    return text.partition("<")[2].rpartition(">")[0] if text.startswith("#") else text


def _parts(op: Op) -> tuple[slice, ...]:
    sizes = op.numbers("operandSegmentSizes")
    if not sizes:  # ops with fixed roles: the last operand is the target, but for a scratch buffer of vbrc
        count = len(op.operands)
        sizes = (1, 1, count - 2) if op.short == "vbrc" else (max(0, count - 1), 1)
    return tuple(slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0)))


def _pipe(op: Op) -> str:
    if op.short in _PIPE_OF:
        return _PIPE_OF[op.short]
    spaces = {found.memory for text in op.types[0] if (found := memref(text)) is not None}
    return "MTE2" if "L1" in spaces else "V"  # L1 is filled by MTE2
