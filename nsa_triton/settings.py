"""The environment variables of nsa_triton: all of them, parsed strictly, in one place."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from nsa_triton.errors import ConfigError

VARIABLES = {
    "NSA_TRITON_CACHE_DIR": "folder for compiled code (default: ~/.cache/nsa_triton)",
    "NSA_TRITON_CONFIG_DIR": "folder of tuned configs that come before the shipped autotune_configs",
    "NSA_TRITON_COMPILERS": "further folders that hold an ascendnpuir package, separated like PATH",
    "NSA_TRITON_LIMITS": "structural (default) or documented: also refuse what CANN's documents refuse",
    "NSA_TRITON_CHECK_INDICES": "0 (default) or 1: read block tables, ids and slots back and refuse bad entries",
}


@dataclass(frozen=True)
class Settings:
    cache_dir: Path
    config_dir: Path | None
    compilers: tuple[Path, ...]
    limits: str
    check_indices: bool


def settings() -> Settings:
    """The settings in force now: the environment is read at every call, and parsed again only when it changed."""
    return _parse(tuple(os.environ.get(name) for name in VARIABLES))


@functools.lru_cache(maxsize=8)
def _parse(values: tuple[str | None, ...]) -> Settings:
    given = {name: value for name, value in zip(VARIABLES, values, strict=True) if value}

    def one_of(name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = given.get(name, default)
        if value not in allowed:
            raise ConfigError(f"environment variable {name}: expected one of {', '.join(allowed)}, got {value!r}")
        return value

    config_dir = given.get("NSA_TRITON_CONFIG_DIR")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"environment variable NSA_TRITON_CONFIG_DIR: no such folder: {config_dir!r}")
    return Settings(
        cache_dir=Path(given.get("NSA_TRITON_CACHE_DIR", Path.home() / ".cache" / "nsa_triton")),
        config_dir=Path(config_dir) if config_dir is not None else None,
        compilers=tuple(Path(place) for place in given.get("NSA_TRITON_COMPILERS", "").split(os.pathsep) if place),
        limits=one_of("NSA_TRITON_LIMITS", "structural", ("structural", "documented")),
        check_indices=one_of("NSA_TRITON_CHECK_INDICES", "0", ("0", "1")) == "1",
    )
