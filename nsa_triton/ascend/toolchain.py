"""Find the Ascend toolchain (triton-ascend and ascendnpu-ir), or say exactly what is wrong with it.

Nothing here imports triton: distributions are looked up by their metadata, so that a broken installation can be
described instead of crashing the interpreter.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nsa_triton.errors import ToolchainError
from nsa_triton.settings import settings

TRITON_ASCEND = "3.2.0"
ASCENDNPU_IR = "1.2.0"
NAMED_OTHERWISE = {"0.1.0": "1.0.0"}  # what executables call themselves, and the version of their wheel
PYTHONS = ((3, 9), (3, 11))  # triton-ascend has wheels for these and those between

INSTALL_CPU = "pip install 'nsa_triton[cpu]'"
REPAIR_ASCEND = ("pip uninstall -y triton triton-ascend", f"pip install --no-deps triton-ascend=={TRITON_ASCEND}")
REPAIR_CUDA = ("pip uninstall -y triton triton-ascend", "pip install --no-deps 'triton>=3.2'")


@dataclass(frozen=True)
class Compiler:
    """One ascendnpu-ir: the folder of its executables and its version."""

    version: str
    bin: Path

    @property
    def compile(self) -> Path:
        return self.bin / "bishengir-compile"

    @property
    def opt(self) -> Path:
        return self.bin / "bishengir-opt"


def distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def triton_owners() -> dict[str, str]:
    """The installed distributions that own the `triton/` folder; more than one means they overwrote each other."""
    found = {name: distribution_version(name) for name in ("triton", "triton-ascend")}
    return {name: version for name, version in found.items() if version is not None}


def triton_problem(wanted: str) -> ToolchainError | None:
    """What keeps `wanted` ("triton-ascend" or "triton") from being imported as `triton`, or None."""
    owners = triton_owners()
    if len(owners) > 1:
        both = " and ".join(f"{name} {version}" for name, version in owners.items())
        return ToolchainError(
            f"{both} are both installed and own the same triton/ folder: one has overwritten files of the other",
            REPAIR_ASCEND if wanted == "triton-ascend" else REPAIR_CUDA,
        )
    if wanted in owners:
        return None
    if owners:
        other = next(iter(owners))
        return ToolchainError(
            f"{other} {owners[other]} owns the triton/ folder, but this target needs {wanted}",
            REPAIR_ASCEND if wanted == "triton-ascend" else REPAIR_CUDA,
        )
    if wanted == "triton":
        return ToolchainError("triton is not installed", ("pip install 'nsa_triton[cuda]'",))
    low, high = (".".join(map(str, version)) for version in PYTHONS)
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        here = ".".join(map(str, sys.version_info[:2]))
        return ToolchainError(
            f"triton-ascend {TRITON_ASCEND} has wheels for Python {low} to {high} only; this is Python {here}",
            ("python3.11 -m venv .venv && . .venv/bin/activate", INSTALL_CPU),
        )
    return ToolchainError("triton-ascend is not installed", (INSTALL_CPU,))


def front_end_problem() -> ToolchainError | None:
    """What keeps kernels from being lowered for Ascend on this machine, or None."""
    problem = triton_problem("triton-ascend")
    if problem is not None:
        return problem
    if importlib.util.find_spec("pybind11") is None:
        return ToolchainError(
            "pybind11 is not installed; triton-ascend imports it without declaring it", ("pip install pybind11",)
        )
    spec = importlib.util.find_spec("triton")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not any(Path(place, "backends", "ascend", "triton-adapter-opt").is_file() for place in places):
        return ToolchainError(
            "the installed triton/ folder has no Ascend back end: another distribution has overwritten or removed it",
            REPAIR_ASCEND,
        )
    return None


def host_problem() -> ToolchainError | None:
    """What keeps kernels from running on this CPU, or None."""
    problem = front_end_problem()
    if problem is not None:
        return problem
    if not compilers():
        return ToolchainError("ascendnpu-ir is not installed", (INSTALL_CPU,))
    if importlib.util.find_spec("llvmlite") is None:
        return ToolchainError("llvmlite is not installed", (INSTALL_CPU,))
    return None


def require(problem: ToolchainError | None) -> None:
    """Raise what one of the functions above found, if anything."""
    if problem is not None:
        raise problem


def compilers() -> tuple[Compiler, ...]:
    """Every ascendnpu-ir found, newest first: the installed one, NSA_TRITON_COMPILERS, and the cache folder."""
    return _compilers(settings().compilers, settings().cache_dir / "compilers")


@functools.lru_cache(maxsize=8)
def _compilers(extra: tuple[Path, ...], cached: Path) -> tuple[Compiler, ...]:
    places = [Path(place) for place in sys.path if place]
    places += [*extra, *(sorted(cached.iterdir()) if cached.is_dir() else ())]
    found: dict[str, Compiler] = {}
    for place in places:
        folder = place / "ascendnpuir" / "bin"
        if (folder / "bishengir-compile").is_file():
            version = _version_of(place)
            found.setdefault(version, Compiler(version, _runnable(folder, version)))
    return tuple(sorted(found.values(), key=lambda c: _ordered(c.version), reverse=True))


def _version_of(place: Path) -> str:
    names = sorted(path.name for path in place.glob("ascendnpu_ir-*.dist-info"))
    return names[-1].removeprefix("ascendnpu_ir-").removesuffix(".dist-info") if names else "unknown"


def _ordered(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _runnable(folder: Path, version: str) -> Path:
    """`folder`, or a copy of it with run bits: the 1.0.0 wheel loses them, and its place may be read-only."""
    tools = [path for path in folder.iterdir() if path.is_file()]
    if all(os.access(tool, os.X_OK) for tool in tools):
        return folder
    try:
        for tool in tools:
            tool.chmod(tool.stat().st_mode | 0o555)
        return folder
    except PermissionError:
        copy = settings().cache_dir / "run_bits" / version
        copy.mkdir(parents=True, exist_ok=True)
        for tool in tools:
            shutil.copy(tool, copy / tool.name)
            (copy / tool.name).chmod(0o755)
        return copy


def compiler(version: str | None = None) -> Compiler:
    """The compiler of that version, or the newest one; a ToolchainError that says how to get it where it is missing."""
    found = compilers()
    for candidate in found:
        if version in (None, candidate.version):
            return candidate
    wanted = version or ASCENDNPU_IR
    have = ", ".join(c.version for c in found) or "none"
    target = settings().cache_dir / "compilers" / wanted
    commands: Sequence[str] = (
        (f"pip install --no-deps --target {target} ascendnpu-ir=={wanted}",) if found else (INSTALL_CPU,)
    )
    raise ToolchainError(f"ascendnpu-ir {wanted} was not found (found: {have})", commands)


@functools.cache
def compiler_on_path() -> str | None:
    """The version of the ascendnpu-ir that triton-ascend calls on a machine with an NPU; None if that is not known."""
    found = shutil.which("bishengir-compile")
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    version = re.search(r"bishengir-compile\D*(\d+\.\d+\.\d+)", said)
    return None if version is None else NAMED_OTHERWISE.get(version[1], version[1])


def hivmc() -> Path | None:
    """The closed last step of the Ascend compiler, which ships with CANN only."""
    found = shutil.which("hivmc")
    return Path(found) if found else None
