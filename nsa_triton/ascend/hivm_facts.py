"""What the final HIVM module says about a kernel: memory, instructions, transfers, and what runs element by element."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nsa_triton.ascend.hivm_module import LOOPS, Function, Memref, Op, functions, memref

ON_CHIP = ("UB", "L1", "L0A", "L0B", "L0C")
CLASSES = ("vector", "cube", "dma", "sync")

_INSTRUCTIONS = {
    "cube": ("mmadL1", "batchMmadL1", "matmul", "mix_matmul", "mix_group_matmul", "Conv1dL1", "Conv2dL1", "Conv3dL1"),
    "dma": (
        *("load", "store", "nd2nz", "nz2nd", "copy", "fixpipe"),
        *("load_scalar", "gather_load", "scatter_store", "indirect_store", "atomic_cas", "atomic_rmw", "atomic_xchg"),
    ),
    "sync": (
        *("set_flag", "wait_flag", "pipe_barrier", "sync_block"),
        *("sync_block_set", "sync_block_wait", "sync_block_lock", "sync_block_unlock"),
    ),
}
_CLASSES = {op: name for name, ops in _INSTRUCTIONS.items() for op in ops}


@dataclass(frozen=True)
class ScalarAccess:
    """One `memref.load` or `memref.store`: the scalar unit reads or writes a single element of a memory.

    kind   what it is
    gm     global memory: a page id, a length, a scalar result; no fallback
    one    always the same element of a tile, such as the result of a reduction; no fallback
    row    an element of a tile for each round of a loop that also does tile work, such as the index of a gathered row
    element   part of a loop that does nothing but scalar work: a tile operation that was not vectorised
    """

    op: str
    source: str
    memory: str
    in_loop: bool
    kind: str


@dataclass(frozen=True)
class Place:
    """An op, or what the kernel's author wrote, and the source line."""

    what: str
    source: str


@dataclass(frozen=True)
class Transfer:
    """One op that moves a tile from or to a tensor of the kernel.

    bytes   of the whole tile, also where a mask may cut it short; both vector cores together
    source  its line in the kernel; loops holds the lines of the loops around it, outermost first
    """

    op: str
    bytes: int
    source: str
    loops: tuple[str, ...]


@dataclass(frozen=True)
class ModuleFacts:
    """What the final module holds.

    used       bytes of each on-chip memory: the highest end address of any buffer
    workspace  bytes of global memory for each block of a launch, for traffic between its cores
    counts     instructions in the text: {"vector" | "cube" | "dma" | "sync": {op: number}}, all cores together
    executed   the same, multiplied by the trip counts of all loops whose bounds are static
    dma_bytes  {op: bytes}, with static trip counts
    transfers  every op that moves a tile between a tensor of the kernel and the chip
    double_buffers  how many buffers exist twice, so that copies overlap with computing

    and, with their source lines: accesses of the scalar unit, ops whose device templates work element by element, masks
    that did not become shorter transfers, and transfers in pieces of one element.
    """

    used: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(ON_CHIP, 0))
    workspace: int = 0
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: {name: {} for name in CLASSES})
    executed: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: {name: {} for name in CLASSES})
    dma_bytes: Mapping[str, int] = field(default_factory=dict)
    transfers: tuple[Transfer, ...] = ()
    double_buffers: int = 0
    scalar_accesses: tuple[ScalarAccess, ...] = ()
    scalar_templates: tuple[Place, ...] = ()
    unstructured_masks: tuple[Place, ...] = ()
    element_transfers: tuple[Place, ...] = ()


def instruction_class(op: Op) -> str | None:
    """One of CLASSES, or None for an op that is no instruction (or only sets a register)."""
    if not op.name.startswith("hivm.hir."):
        return None
    return _CLASSES.get(op.short, "vector" if op.short.startswith("v") else None)


def module_facts(text: str) -> ModuleFacts:
    """Read `text`, the final module in generic form; no text has no facts."""
    everything = functions(text)
    host = [function for function in everything if "_infer_" in function.name]
    device = [function for function in everything if "_infer_" not in function.name]
    counts, executed = _instructions(device)
    return ModuleFacts(
        used={name: max((end for f in device for end in _ends(f, name)), default=0) for name in ON_CHIP},
        workspace=_workspace(host),
        counts=counts,
        executed=executed,
        dma_bytes=_dma_bytes(device),
        transfers=tuple(transfer for function in device for transfer in _transfers(function)),
        double_buffers=sum(_is_double_buffer(op) for function in device for op in function.ops),
        scalar_accesses=tuple(access for function in device for access in _scalar_accesses(function)),
        scalar_templates=_distinct(place for function in device for place in _scalar_templates(function)),
        unstructured_masks=_distinct(place for function in device for place in _unstructured_masks(function)),
        element_transfers=_distinct(place for function in device for place in _element_transfers(function)),
    )


def _distinct(places: Iterator[Place]) -> tuple[Place, ...]:
    return tuple(dict.fromkeys(places))


def _ends(function: Function, memory: str) -> Iterator[int]:
    """The end addresses of the buffers in one memory. L0A and L0B have none: the cube's device templates fill them."""
    for op in function.ops:
        if op.short != "pointer_cast":
            continue
        buffer = memref(op.types[1][0])
        if buffer is not None and buffer.memory == memory:
            addresses = [function.constant(operand) for operand in op.operands]
            yield max((address for address in addresses if address is not None), default=0) + (buffer.bytes or 0)


def _workspace(host: list[Function]) -> int:
    """Bytes of global memory that each block of a launch needs for traffic between its cores."""
    for function in host:
        if function.name.endswith("infer_workspace_shape_function"):
            return next((value for op in function.ops if (value := op.integer()) is not None), 0)
    return 0


def _instructions(device: list[Function]) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    counts: dict[str, Counter[str]] = {name: Counter() for name in CLASSES}
    executed: dict[str, Counter[str]] = {name: Counter() for name in CLASSES}
    for function in device:
        for op in function.ops:
            kind = instruction_class(op)
            if kind is not None:
                counts[kind][op.short] += 1
                executed[kind][op.short] += function.trips(op)
    return _by_size(counts), _by_size(executed)


def _by_size(counters: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: dict(counter.most_common()) for name, counter in counters.items()}


def _global_side(op: Op) -> tuple[str, Memref, str] | None:
    """The operand of a transfer that lies in global memory: value, type and the type's text; else the first operand."""
    shaped = [(v, found, t) for v, t in zip(op.operands, op.types[0], strict=True) if (found := memref(t)) is not None]
    return next((side for side in shaped if side[1].memory == "GM"), shaped[0] if shaped else None)


def _dma_bytes(device: list[Function]) -> dict[str, int]:
    """Bytes moved, by op, with static trip counts. A tile cut short by a mask counts in full, an unknown size as 0."""
    total: Counter[str] = Counter()
    for function in device:
        for op in function.ops:
            side = _global_side(op) if instruction_class(op) == "dma" else None
            if side is not None:
                value, _, text = side
                total[op.short] += function.trips(op) * (function.static_bytes(value, text) or 0)
    return dict(total.most_common())


def _transfers(function: Function) -> Iterator[Transfer]:
    """Without those between the cores of a block. Of its two vector cores each does its half of a tile, or, under a
    condition, one of them does all of it."""
    halves = function.name.endswith("_mix_aiv")
    for op in function.ops:
        side = _global_side(op) if instruction_class(op) == "dma" else None
        if side is None or side[1].memory != "GM" or _in_workspace(function, op):
            continue
        cores = 2 if halves and not any(parent.name == "scf.if" for parent in op.parents) else 1
        size = cores * (function.static_bytes(side[0], side[2]) or 0)
        yield Transfer(op.short, size, op.source, tuple(loop.source for loop in op.loops))


def _is_double_buffer(op: Op) -> bool:
    """Multi-buffering is a select between two buffers of one memory, by the parity of the loop's round."""
    if op.name != "arith.select":
        return False
    buffer = memref(op.types[1][0])
    return buffer is not None and buffer.memory in ON_CHIP


def _scalar_accesses(function: Function) -> Iterator[ScalarAccess]:
    for op in function.ops:
        if op.name in ("memref.load", "memref.store"):
            memory, loops = _accessed(op)[1].memory, op.loops
            yield ScalarAccess(op.name, op.source, memory, bool(loops), _kind(function, op, memory))


def _accessed(op: Op) -> tuple[str, Memref]:
    """The buffer operand of a `memref.load` or `memref.store`, and its type."""
    position = 1 if op.name == "memref.store" else 0
    return op.operands[position], memref(op.types[0][position]) or Memref((), "", "GM", None)


def _kind(function: Function, op: Op, memory: str) -> str:
    fallback_loop = bool(op.loops) and _is_fallback_loop(function, op.loops[-1])
    if fallback_loop and (memory == "GM" or _is_varying(function, op)):
        return "element"
    if memory == "GM":
        return "gm"
    return "row" if op.loops and _is_varying(function, op) else "one"


def _is_varying(function: Function, op: Op) -> bool:
    """Whether the index of the element is anything but constants."""
    position = 1 if op.name == "memref.store" else 0
    indices = [*op.operands[position + 1 :]]
    for view in function.views(op.operands[position]):
        indices += view.operands[1:]
    return any(function.constant(index) is None for index in indices)


def _is_fallback_loop(function: Function, loop: Op) -> bool:
    """No tile work inside, and elements of tiles, or stores to global memory: the compiler (or the kernel) loops over
    elements. A loop that only reads global memory, such as a search in a table of lengths, is none."""
    if any(instruction_class(op) in ("vector", "cube", "dma") or op.name in LOOPS for op in loop.regions):
        return False
    return any(
        _is_varying(function, op) and (op.name == "memref.store" or _accessed(op)[1].memory != "GM")
        for op in loop.regions
        if op.name in ("memref.load", "memref.store")
    )


def _unstructured_masks(function: Function) -> Iterator[Place]:
    """Masks that did not become shorter transfers. `tl.load` then reads the whole tile and selects, `tl.store` reads
    the whole tile, selects, and writes it back; all these ops carry the place of the one call in the source. Transfers
    from and to the workspace between cores are not the kernel's."""
    at: dict[str, set[tuple[str, int, int]]] = {
        name: {
            op.location
            for op in function.ops
            if op.name == f"hivm.hir.{name}" and op.location is not None and not _in_workspace(function, op)
        }
        for name in ("load", "store", "vsel")
    }
    for op in function.ops:
        if _in_workspace(function, op):
            continue
        if op.name == "hivm.hir.store" and op.location in at["load"] & at["vsel"]:
            yield Place("tl.store", op.source)
        elif op.name == "hivm.hir.load" and op.location in at["vsel"] - at["store"]:
            yield Place("tl.load", op.source)


def _in_workspace(function: Function, op: Op) -> bool:
    """Whether `op` moves data between the cores of a block: the workspace is bytes, and all its tiles are views."""
    side = _global_side(op)
    return side is not None and any(view.name == "memref.view" for view in function.views(side[0]))


def _scalar_templates(function: Function) -> Iterator[Place]:
    """Ops that stay structured, but whose device template in the compiler's wheel loops over elements."""
    for op in function.ops:
        shaped = [found for text in op.types[0] if (found := memref(text)) is not None]
        if op.name == "hivm.hir.vflip" or (
            op.name == "hivm.hir.vsel" and any(operand.element == "i64" for operand in shaped)
        ):
            yield Place(op.name, op.source)
        elif _strides_apart(op) and any(len(side.shape) > 1 and _run_time_stride(side) for side in shaped):
            yield Place(f"{op.name} of a tile with a run-time stride along its last axis", op.source)


def _run_time_stride(side: Memref) -> bool:
    return side.memory == "GM" and side.strides is not None and side.strides[-1] is None


def _element_transfers(function: Function) -> Iterator[Place]:
    """Transfers by the DMA engine in pieces of one element, each of which takes 32 bytes of the UB."""
    return (Place(op.name, op.source) for op in function.ops if _strides_apart(op))


def _strides_apart(op: Op) -> bool:
    """Whether `op` is a transfer between the chip and global memory that is not contiguous there."""
    side = _global_side(op) if op.name in ("hivm.hir.load", "hivm.hir.store", "hivm.hir.nd2nz") else None
    return side is not None and side[1].memory == "GM" and side[1].elementwise
