"""What a sweep knows so far: JSON lines in the cache folder, each written as soon as it is known.

The first line says which sweep it is. Whatever decides a verdict is part of the file's name, by a hash: a changed
kernel, compiler, model or workload begins a new journal, and the same sweep goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from nsa_triton.errors import ConfigError
from nsa_triton.settings import settings
from nsa_triton.tuning.sweep import VERDICTS, Candidate, Sweep, Verdict

RIGHT = ""  # what the gate says of numbers that are right
logger = logging.getLogger("nsa_triton")


def journal_folder() -> Path:
    return settings().cache_dir / "tuning"


def journal_path(sweep: Sweep, identity: Mapping[str, Any]) -> Path:
    """`identity` is all that decides the verdicts, and names the chip by which they were found."""
    hashed = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    parts = (sweep.op, sweep.kernel, identity["chip"], sweep.compiler, sweep.shape.name, f"T{sweep.tokens}", hashed)
    name = "-".join(part for part in parts if part)
    return journal_folder() / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.jsonl"


class Journal:
    """Open for one process at a time. `verdicts` and `gated` are what was known when it was opened, and since."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.verdicts: dict[Candidate, Verdict] = {}
        self.gated: dict[Candidate, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error
        self._lock()
        if fresh:
            self._file.truncate(0)
        self._read()
        if self._file.tell() == 0:
            self._append({"sweep": identity})

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"{self.path}: another process is at work on this very sweep") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def note(self, candidate: Candidate, verdict: Verdict) -> None:
        self.verdicts[candidate] = verdict
        self._append({**candidate.to_json(), **verdict.to_json()})

    def note_gate(self, candidate: Candidate, said: str) -> None:
        """What the check cases said: "" where their numbers are right."""
        self.gated[candidate] = said
        self._append({**candidate.to_json(), "gate": said})

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _read(self) -> None:
        self._file.seek(0)
        good = _without_torn_line(self.path, self._file)
        for number, line in enumerate(good.splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self.path}: line {number} is not a line of a journal ({error}); --fresh starts over"
                ) from error

    def _take(self, record: Mapping[str, Any]) -> None:
        if "sweep" in record:
            return
        candidate = Candidate.of(record["tiles"], record["options"])
        if "gate" in record:
            self.gated[candidate] = str(record["gate"])
            return
        if record["verdict"] not in VERDICTS:
            raise ValueError(f"verdict {record['verdict']!r}")
        figures = {name: value for name, value in record.items() if name not in ("tiles", "options")}
        self.verdicts[candidate] = Verdict(**figures)


def _without_torn_line(path: Path, file: IO[bytes]) -> bytes:
    """The lines of the file. A last one that a killed process did not finish is cut off, in the file too."""
    content = file.read()
    end = content.rfind(b"\n") + 1
    lines = content[:end]
    if end:
        last = lines[:-1].rpartition(b"\n")[2]
        try:
            json.loads(last)
        except ValueError:
            end -= len(last) + 1
    if end < len(content):
        logger.warning("%s: the last line was not finished; that candidate is tried again", path)
        file.truncate(end)
        file.seek(end)
    return content[:end]


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be written: {error.strerror}; NSA_TRITON_CACHE_DIR names another folder for it")
