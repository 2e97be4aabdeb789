"""Puts the winner of a sweep into a file of configs: one entry per line, all or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsa_triton.errors import ConfigError
from nsa_triton.runtime import configs
from nsa_triton.runtime.configs import SCHEMA, load

Entry = dict[str, Any]


def merge(folder: Path, target: str, op: str, entry: Entry, *, force: bool = False) -> Path:
    """Put `entry` into folder/target/op.json, in the place of one for the same kernel, key and workload.

    A ConfigError, and nothing is changed, where the file is corrupt or newer than this program, where it cannot be
    written, and where a simulated entry would take the place of a measured one; the last is what `force` allows.
    """
    file = folder / target / f"{op}.json"
    with _alone(file):
        _put(file, {"schema": SCHEMA, "op": op, "target": target}, entry, force)
    forget_configs()
    return file


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Other tuners wait until this one has read, changed and written the file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(file.parent, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(file, error) from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # and with it goes the lock


def _put(file: Path, head: Mapping[str, Any], entry: Entry, force: bool) -> None:
    entries = _entries(file)
    rivals = [other for other in entries if _same_place(other, entry)]
    if not force and entry["evidence"]["how"] == "simulated":
        for rival in rivals:
            if rival["evidence"]["how"] == "measured":
                raise ConfigError(
                    f"{file}: the entry for {entry['kernel']} with key {entry['key']} is measured, the new one is "
                    "simulated; --force replaces it all the same"
                )
    kept = [other for other in entries if other not in rivals]
    # Of entries that fit equally well the first is used: exact keys go before those that fit more.
    place = next((i for i, other in enumerate(kept) if other["kernel"] == entry["kernel"]), len(kept))
    kept.insert(place, entry)
    _set_lengths(kept, entry)
    _write(file, head, kept)


def require_mergeable(folder: Path, target: str, op: str) -> None:
    """Raises what `merge` would raise of the file and its folder: known before hours of work, not after."""
    file = folder / target / f"{op}.json"
    _entries(file)
    existing = next(parent for parent in (file.parent, *file.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}; --output DIR names another folder") from error


def forget_configs() -> None:
    """Files may have changed: the next look-up reads them again."""
    load.cache_clear()
    configs._lookup.cache_clear()


def _entries(file: Path) -> list[Entry]:
    """The entries as the file spells them; refused like a look-up refuses them."""
    load.cache_clear()
    checked = load(file)  # raises what is wrong with it
    if not checked:
        return []
    entries: list[Entry] = json.loads(file.read_text())["entries"]
    return entries


def _same_place(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one takes the place of the other: same kernel, key and length of the call that was tuned."""
    same = one["kernel"] == other["kernel"] and one["key"] == other["key"]
    return same and _tuned_length(one) == _tuned_length(other)


def _tuned_length(entry: Mapping[str, Any]) -> int:
    """Of the call that an entry was tuned with. The `length` of the shortest is 0, so that it serves shorter ones."""
    of_workload = entry["evidence"].get("workload")
    return int(of_workload["length"]) if isinstance(of_workload, dict) else int(entry["length"])


def _set_lengths(entries: list[Entry], new: Entry) -> None:
    """Among tuned entries of this kernel and key the shortest serves all shorter calls too."""
    siblings = [other for other in entries if (other["kernel"], other["key"]) == (new["kernel"], new["key"])]
    tuned = [other for other in siblings if isinstance(other["evidence"].get("workload"), dict)]
    shortest = min(_tuned_length(other) for other in siblings)
    for other in tuned:
        length = _tuned_length(other)
        other["length"] = 0 if length == shortest else length


def _write(file: Path, head: Mapping[str, Any], entries: list[Entry]) -> None:
    lines = ",\n".join(f"    {json.dumps(entry, ensure_ascii=False)}" for entry in entries)
    fields = "".join(f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items())
    text = f'{{\n{fields}  "entries": [\n{lines}\n  ]\n}}\n'
    beside: Path | None = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as opened:
            beside = Path(opened.name)
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        beside.chmod(0o644)
        beside.replace(file)
    except OSError as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{file}: cannot be written: {error.strerror}; the results are in the journal, so that the same command with "
        "--output DIR writes them at once"
    )
