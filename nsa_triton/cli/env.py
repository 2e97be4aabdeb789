"""Show what this machine has: versions, who owns the triton/ folder, compilers, chips, settings.

Paste it into a bug report. Every probe is guarded: one that fails says why and leaves the others alone.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable

import torch

import nsa_triton
from nsa_triton.ascend.toolchain import (
    compilers,
    distribution_version,
    front_end_problem,
    hivmc,
    triton_owners,
)
from nsa_triton.cli.view import print_json
from nsa_triton.runtime.configs import config_roots
from nsa_triton.runtime.target import present_targets, target_of
from nsa_triton.settings import VARIABLES

EXAMPLE = "nsa-triton env"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command takes no arguments of its own."""


def run(options: argparse.Namespace) -> int:
    found = {name: _guarded(probe) for name, probe in PROBES.items()}
    if options.json:
        print_json(found)
    else:
        width = max(map(len, found)) + 2
        for name, value in found.items():
            print(f"{name:<{width}}{value}")
    return 0


def _guarded(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except Exception as error:  # noqa: BLE001 (a report of what is broken must not break)
        return f"probe failed: {type(error).__name__}: {error}"


def _version(distribution: str) -> Callable[[], str]:
    return lambda: distribution_version(distribution) or "not installed"


def _triton() -> str:
    owners = triton_owners()
    names = " and ".join(f"{name} {version}" for name, version in owners.items()) or "nothing installed"
    return names if len(owners) < 2 else f"CLOBBERED: {names} overwrote each other"


def _front_end() -> str:
    problem = front_end_problem()
    return "ready" if problem is None else str(problem).replace("\n", " ")


def _compilers() -> str:
    return ", ".join(f"ascendnpu-ir {found.version}" for found in compilers()) or "none found"


def _targets() -> str:
    targets = [target_of(torch.device(kind)) for kind in present_targets()]
    return ", ".join(f"{target.name} ({target.units})" for target in targets)


def _settings() -> str:
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
    return ", ".join(given) or "all at their defaults"


PROBES: dict[str, Callable[[], str]] = {
    "nsa_triton": lambda: nsa_triton.__version__,
    "python": platform.python_version,
    "system": lambda: f"{platform.system()} {platform.release()} {platform.machine()}",
    "torch": lambda: torch.__version__,
    "torch_npu": _version("torch-npu"),
    "triton/ belongs to": _triton,
    "Ascend front end": _front_end,
    "Ascend compilers": _compilers,
    "hivmc (CANN)": lambda: str(hivmc() or "not found: compiles end at the HIVM module"),
    "llvmlite": _version("llvmlite"),
    "targets": _targets,
    "configs": lambda: ", then ".join(map(str, config_roots())),
    "settings": _settings,
}
