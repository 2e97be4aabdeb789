"""Files of results: rows are on the disk as soon as they are there, and a finished run replaces older rows at once.

<folder>/<target>/<name>.csv        the newest row of each case, provider and state of the caches
<folder>/<target>/<name>.csv.part   rows of a run that is not finished

What a simulator estimates and what bounds say stands in columns of its own, simulated_us and bound_us, and estimates
in a folder of their own, `simulated-<chip>`, that no measured row gets into.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nsa_triton.errors import ArgumentValueError

ENCODING = "utf-8"


@dataclass(frozen=True)
class Row:
    """One provider on one case, with cold or with warm caches; what does not apply is empty.

    status       ok, or why there is no time: wrong (and by how much), failed (with the error), missing
    rounds       how often it was timed
    rms_error, rms_limit   relative error of the output that comes closest to its limit, and the limit: the gate
    """

    provider: str
    status: str
    op: str
    shape: str
    dtype: str
    batch: str
    tokens: str
    indices: str
    cache: str = ""
    p20_us: str = ""
    p50_us: str = ""
    p80_us: str = ""
    simulated_us: str = ""
    bound_us: str = ""
    rounds: str = ""
    rms_error: str = ""
    rms_limit: str = ""
    live_blocks: str = ""
    flops: str = ""
    bytes: str = ""
    target: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    compiler: str = ""
    nsa_triton: str = ""
    commit: str = ""
    utc: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        return self.op, self.shape, self.dtype, self.batch, self.tokens, self.indices

    @property
    def key(self) -> tuple[str, ...]:
        return *self.case, self.provider, self.cache

    @property
    def us(self) -> float | None:
        """The time, whatever kind it is of."""
        text = self.p50_us or self.simulated_us or self.bound_us
        return float(text) if text else None


COLUMNS = tuple(field.name for field in fields(Row))


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    reader = csv.DictReader(io.StringIO(_whole_lines(path)))
    if reader.fieldnames is None:
        return []
    if tuple(reader.fieldnames) != COLUMNS:
        raise ArgumentValueError(
            str(path), f"a file with the columns {', '.join(COLUMNS)}", ", ".join(reader.fieldnames)
        )
    return [Row(**row) for row in reader]


def _whole_lines(path: Path) -> str:
    """Without a last line that was cut when the machine stopped."""
    text = path.read_text(encoding=ENCODING)
    return text[: text.rfind("\n") + 1]


class ResultFile:
    """The rows of one run for one target."""

    def __init__(self, folder: Path, name: str, *, resume: bool) -> None:
        self.path, self.part = folder / f"{name}.csv", folder / f"{name}.csv.part"
        if self.part.exists() and not resume:
            raise ArgumentValueError(
                "--resume",
                "to be given, because an earlier run was not finished",
                f"rows of it in {self.part}",
                "Pass --resume to go on, or delete that file to start again",
            )
        self.rows = read(self.part)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_part(_lines([asdict(row) for row in self.rows], header=True), "w")
        except OSError as error:
            raise _cannot_write(folder, error) from error

    def append(self, rows: Iterable[Row]) -> None:
        """They are on the disk when this returns."""
        new = list(rows)
        size = self.part.stat().st_size
        try:
            self._write_part(_lines([asdict(row) for row in new]), "a")
        except OSError as error:
            os.truncate(self.part, size)  # no half a row
            raise _cannot_write(self.part, error) from error
        self.rows += new

    def finish(self) -> None:
        """Put the rows in place of older ones of the same case, provider and caches; others stay."""
        new = {row.key for row in self.rows}
        merged = [*(row for row in read(self.path) if row.key not in new), *self.rows]
        try:
            write_atomically(self.path, _lines([asdict(row) for row in merged], header=True))
            self.part.unlink()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _write_part(self, text: str, mode: str) -> None:
        with self.part.open(mode, encoding=ENCODING, newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, and a full disk leaves the old one."""
    with tempfile.NamedTemporaryFile("w", encoding=ENCODING, newline="", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink()
            raise


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """A table of which all rows are known, its head among them; folders are made."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def _lines(rows: list[dict[str, str]], *, header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cannot_write(path: Path, error: OSError) -> ArgumentValueError:
    return ArgumentValueError(
        "--output",
        "a folder that can be written",
        f"{path}: {error.strerror}",
        "Rows that were written before are kept; --resume goes on from them",
    )
