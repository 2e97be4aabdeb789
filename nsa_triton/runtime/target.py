"""What chip is this? A Target is found when a tensor arrives, never at import."""

from __future__ import annotations

import functools
import re
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from nsa_triton.ascend.chips import Chip
from nsa_triton.ascend.toolchain import compiler_on_path
from nsa_triton.errors import ArgumentValueError

KIND_OF_DEVICE = {"cpu": "cpu", "cuda": "cuda", "npu": "npu", "privateuseone": "npu", "meta": "meta"}


@dataclass(frozen=True)
class Target:
    """A chip. `name` is also the folder of its tuned configs: cpu, nvidia-h200, Ascend910B2."""

    kind: str  # cpu, cuda or npu
    name: str
    vector_cores: int  # cpu: worker threads, cuda: multiprocessors
    cube_cores: int
    compiler: str | None = None  # npu: the version of ascendnpu-ir that compiles for it, as far as it is known

    @property
    def is_ascend_code(self) -> bool:
        """Whether kernels go through triton-ascend: on an NPU, and on a CPU, which executes the NPU's lowering."""
        return self.kind in ("npu", "cpu")

    @property
    def units(self) -> str:
        """What runs programs, for people."""
        if self.kind == "npu":
            return f"{self.vector_cores} vector cores, {self.cube_cores} cube cores"
        return f"{self.vector_cores} {'threads' if self.kind == 'cpu' else 'multiprocessors'}"

    def programs(self, n_items: int, *, uses_cube: bool = False) -> int:
        """How many programs to start for a persistent kernel with `n_items` items of work."""
        if self.kind == "cuda":
            return max(1, n_items)  # the hardware scheduler balances better than a loop
        return max(1, min(n_items, self.cube_cores if uses_cube else self.vector_cores))

    def splits(self, n_items: int, *, most: int) -> int:
        """Into how many parts to split each of `n_items` items of work on the cube, so that few items fill the chip.

        A CPU counts as 8 cores whatever its threads: the parts decide the order of summation, and with it the bits.
        """
        cores = {"npu": self.cube_cores, "cuda": 2 * self.cube_cores, "cpu": 8}[self.kind]
        return max(1, min(most, cores // n_items))

    def tile(self, size: int) -> int:
        """The shortest tile that holds `size` elements: Ascend takes any length, upstream Triton powers of two."""
        return size if self.is_ascend_code else 1 << max(0, size - 1).bit_length()


# The chip that takes the place of the CPU while kernels run in its simulator; see simulation.py.
STAND_IN: ContextVar[Target | None] = ContextVar("STAND_IN", default=None)


def target_of(device: torch.device) -> Target:
    """The target that runs kernels on tensors of `device`."""
    kind = KIND_OF_DEVICE.get(device.type)
    if kind == "cpu" and (stand_in := STAND_IN.get()) is not None:
        return stand_in
    if kind == "cpu":
        threads = torch.get_num_threads()  # follows torch.set_num_threads
        return Target("cpu", "cpu", threads, threads)
    if kind == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    if kind == "npu":
        return _npu_target(device.index)
    raise ArgumentValueError(
        "device", "a tensor on cpu, cuda or npu", device, "Move the tensors, or pass impl='reference'."
    )


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    return Target("cuda", name, properties.multi_processor_count, properties.multi_processor_count)


@functools.cache
def _npu_target(index: int | None) -> Target:
    import torch_npu  # noqa: F401  (adds torch.npu)
    from triton.runtime import driver

    index = torch.npu.current_device() if index is None else index  # type: ignore[attr-defined]
    properties = driver.active.utils.get_device_properties(index)
    name = torch.npu.get_device_name(index)  # type: ignore[attr-defined]
    return Target("npu", name, properties["num_vectorcore"], properties["num_aicore"], compiler_on_path())


def ascend_target(chip: Chip, compiler: str | None = None) -> Target:
    """A chip to compile for on a machine that does not have it, by a version of the compiler, or any."""
    return Target("npu", chip.name, chip.vector_cores, chip.cube_cores, compiler)


def present_targets() -> list[str]:
    """The kinds of target on this machine, the fastest first. The CPU is always there."""
    npu = getattr(torch, "npu", None)  # there once torch_npu is imported, which torch >= 2.5 does by itself
    kinds = []
    if npu is not None and npu.is_available():
        kinds.append("npu")
    if torch.cuda.is_available():
        kinds.append("cuda")
    return [*kinds, "cpu"]
