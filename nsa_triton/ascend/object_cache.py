"""Object files on disk, shared by all processes of a user: written atomically, verified when read."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from nsa_triton.settings import settings

_log = logging.getLogger("nsa_triton")
_MAGIC = b"nsa_triton object 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


def load(key: str) -> bytes | None:
    """The object stored under `key`, or None where there is none or the file is damaged."""
    try:
        stored = _path(key).read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + _DIGEST_BYTES
    code = stored[head:]
    if stored[:head] == _MAGIC + hashlib.sha256(code).digest():
        return code
    _log.warning("damaged file in the compile cache, compiling again: %s", _path(key))
    return None


def store(key: str, code: bytes) -> None:
    """Keep `code` under `key`; a folder that cannot be written costs a warning, not the call."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".incomplete-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(code).digest() + code)
            Path(temporary).replace(path)  # atomic: a reader sees the old file, none, or the whole new one
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.debug("compile cache: %s", error)
        _warn_once(path.parent)


@functools.cache
def _warn_once(folder: Path) -> None:
    _log.warning("the compile cache %s cannot be written: kernels are compiled again in every process", folder)


def _path(key: str) -> Path:
    return settings().cache_dir / "native" / f"{key}.o"
