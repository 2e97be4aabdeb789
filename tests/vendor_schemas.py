"""What torch_npu says of its NSA operators, taken from its wheels. The tests compare our functions with it.

    pip download --no-deps torch-npu==2.9.0 -d wheels       # and other versions
    python -m tests.vendor_schemas wheels/*.whl             # rewrites tests/vendor_schemas.json

A wheel holds the list from which torch_npu's operators are generated. Nothing of it is run, and no CANN is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
LIST = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
OPERATOR = re.compile(r"- func: (npu_nsa_\w+.*)")


def read() -> dict[str, list[str]]:
    """Each schema, and the versions of torch_npu that have it."""
    found: dict[str, list[str]] = json.loads(FILE.read_text())
    return found


def schemas(wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        yield from OPERATOR.findall(archive.read(LIST).decode())


def version(wheel: Path) -> str:
    """As wheels are named: torch_npu-2.9.0-cp311-..."""
    return wheel.name.split("-")[1]


def _ascending(wheel: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version(wheel))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    found: dict[str, list[str]] = {}
    for wheel in sorted(parser.parse_args().wheels, key=_ascending):
        for schema in schemas(wheel):
            found.setdefault(schema, []).append(version(wheel))
    FILE.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
