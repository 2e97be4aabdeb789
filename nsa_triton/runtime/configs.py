"""Tile sizes: load, check and look up the files under autotune_configs.

A config is a pure function of (op, kernel, target, key, length): nothing is measured in a user's call. The user's
folder, if there is one, comes before the shipped one; in each, entries of the target's own file are tried first, then
those of chips with the same memories, then those of `default/`; within a file the first entry whose key matches and
whose `length` is the largest not above the request wins.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nsa_triton.ascend.chips import UB_LIMIT, relatives
from nsa_triton.errors import ConfigError
from nsa_triton.runtime.target import Target
from nsa_triton.settings import settings

SCHEMA = 1
TILE_STEP, TILE_MAX = 16, 4096
EVIDENCE = ("measured", "simulated", "default")
ENTRY_FIELDS = {"kernel", "key", "length", "tiles", "options", "evidence"}
logger = logging.getLogger("nsa_triton")

KeyItems = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Config:
    """Tiles are constexprs, in multiples of 16; `options` maps a kind of target to its launch options."""

    kernel: str
    key: Mapping[str, Any]
    length: int
    tiles: Mapping[str, int]
    options: Mapping[str, Mapping[str, Any]]
    evidence: Mapping[str, Any]
    file: Path

    @property
    def ub_limit(self) -> int:
        """Percent of the unified buffer that this entry may take."""
        return int(self.evidence.get("ub_limit", UB_LIMIT))

    def matches(self, key: Mapping[str, Any], length: int) -> bool:
        return self.length <= length and all(_fits(wanted, key.get(name)) for name, wanted in self.key.items())


def _fits(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, Mapping):
        return value is not None and bool(value <= wanted["max"])
    return bool(value == wanted)


def config_root() -> Path:
    """The folder whose configs come first: the user's, the one inside the installed package, or the repository's."""
    return config_roots()[0]


def config_roots() -> tuple[Path, ...]:
    """The folders of configs in the order in which they are asked. What the user's lacks, the shipped one has."""
    given = settings().config_dir
    shipped = _shipped_configs()
    return (shipped,) if given is None else (given, shipped)


@functools.cache
def _shipped_configs() -> Path:
    package = Path(__file__).parent.parent
    inside = package / "autotune_configs"
    return inside if inside.is_dir() else package.parent / "autotune_configs"


def lookup(op: str, kernel: str, target: Target, key: Mapping[str, Any], length: int, tiles: tuple[str, ...]) -> Config:
    """The config of `kernel` for this key and length; `tiles` names the tile sizes that the kernel needs."""
    instead = _OVERRIDES.get().get(kernel)
    if instead is not None:
        return instead
    wanted = tuple(({**key, "compiler": target.compiler} if target.compiler else key).items())
    found = _lookup(config_roots(), op, kernel, target.name, wanted, length, tiles)
    _LISTENER.get()(op, wanted, length, tiles, found)
    return found


Listener = Callable[[str, KeyItems, int, tuple[str, ...], Config], None]
_LISTENER: ContextVar[Listener] = ContextVar("LISTENER", default=lambda *_: None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """`listener` is told of every look-up inside: op, key, length, tiles, and what was found."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


_OVERRIDES: ContextVar[Mapping[str, Config]] = ContextVar("OVERRIDES", default=MappingProxyType({}))


@contextmanager
def overriding(
    kernel: str, tiles: Mapping[str, int], options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Iterator[None]:
    """Look-ups of `kernel` inside find these tiles and options whatever the files say: for sweeps and tests."""
    config = Config(kernel, {}, 0, tiles, options, {"how": "default", "ub_limit": 100}, Path("override"))
    token = _OVERRIDES.set({**_OVERRIDES.get(), kernel: config})
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


@functools.lru_cache(maxsize=4096)
def _lookup(
    roots: tuple[Path, ...], op: str, kernel: str, target: str, items: KeyItems, length: int, tiles: tuple[str, ...]
) -> Config:
    key = dict(items)
    folders = (target, *relatives(target), "default")
    files = [root / folder / f"{op}.json" for root in roots for folder in folders]
    for file in files:
        fitting = [c for c in load(file) if c.kernel == kernel and c.matches(key, length)]
        if fitting:
            best = max(fitting, key=lambda c: c.length)  # of equal lengths, the first
            if set(best.tiles) != set(tiles):
                raise ConfigError(
                    f"{best.file}: entry for {kernel} with key {dict(best.key)}: expected the tiles "
                    f"{', '.join(tiles)}, got {', '.join(best.tiles) or 'none'}"
                )
            _say_once(op, target, file)
            return best
    asked = " or ".join(str(file) for file in files if load(file) or file.parent.name in (target, "default"))
    raise ConfigError(
        f"no config for {kernel} with key {key} and length {length} in {asked}; "
        "add an entry (autotune_configs/README.md describes the format)"
    )


@functools.cache
def _say_once(op: str, target: str, file: Path) -> None:
    source = file.parent.name
    found = "tuned config" if source == target else "no tuned config"
    instead = f"that of {source}, " if source in relatives(target) else ""
    logger.info(f"%s: {found} for %s, using {instead}%s", op, target, file)


@functools.lru_cache(maxsize=256)
def load(file: Path) -> tuple[Config, ...]:
    """All entries of one file, checked; a file that does not exist has none."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}; restore it from version control or delete it") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ConfigError(f"{file}: expected an object with schema {SCHEMA}, got schema {_schema_of(content)}")
    for field, expected in (("op", file.stem), ("target", file.parent.name)):
        if content.get(field) != expected:
            raise ConfigError(f"{file}: expected {field} {expected!r} (as the path says), got {content.get(field)!r}")
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise ConfigError(f"{file}: expected a list of entries, got {type(entries).__name__}")
    return tuple(_checked(file, number, entry) for number, entry in enumerate(entries))


def _schema_of(content: Any) -> Any:
    return content.get("schema") if isinstance(content, dict) else None


def _checked(file: Path, number: int, entry: Any) -> Config:
    def refuse(what: str, expected: str, got: Any) -> ConfigError:
        return ConfigError(f"{file}: entry {number}: {what}: expected {expected}, got {got!r}")

    if not isinstance(entry, dict) or set(entry) != ENTRY_FIELDS:
        raise refuse("fields", ", ".join(sorted(ENTRY_FIELDS)), sorted(entry) if isinstance(entry, dict) else entry)
    for name in ("key", "tiles", "options", "evidence"):
        if not isinstance(entry[name], dict):
            raise refuse(name, "an object", entry[name])
    if not isinstance(entry["kernel"], str):
        raise refuse("kernel", "a name", entry["kernel"])
    if not isinstance(entry["length"], int) or entry["length"] < 0:
        raise refuse("length", "an integer >= 0", entry["length"])
    for name, wanted in entry["key"].items():
        if isinstance(wanted, dict) and (set(wanted) != {"max"} or not isinstance(wanted["max"], int)):
            raise refuse(f"key.{name}", 'a value, or {"max": integer}', wanted)
    for name, size in entry["tiles"].items():
        if type(size) is not int or size % TILE_STEP or not TILE_STEP <= size <= TILE_MAX:
            raise refuse(f"tiles.{name}", f"a multiple of {TILE_STEP} in [{TILE_STEP}, {TILE_MAX}]", size)
    for kind, options in entry["options"].items():
        if kind not in ("npu", "cuda", "cpu") or not isinstance(options, dict):
            raise refuse(f"options.{kind}", "an object under npu, cuda or cpu", options)
    if entry["evidence"].get("how") not in EVIDENCE:
        raise refuse("evidence.how", f"one of {', '.join(EVIDENCE)}", entry["evidence"].get("how"))
    limit = entry["evidence"].get("ub_limit", UB_LIMIT)
    if type(limit) is not int or not UB_LIMIT <= limit <= 100:
        raise refuse("evidence.ub_limit", f"an integer in [{UB_LIMIT}, 100]", limit)
    return Config(**entry, file=file)
