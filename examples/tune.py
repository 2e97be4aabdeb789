"""Tune the tiles of one operator for a chip, in a small budget, and show what was written.

For an Ascend chip that is not in this machine, times are simulated. Everything goes to a temporary folder, unless
--output names one; `nsa-triton tune` does the same with all its options.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--op", default="compress_infer", help="an op family or function (default: %(default)s)")
parser.add_argument("--chip", default="Ascend910B2", help="or cpu, or a chip of this machine (default: %(default)s)")
parser.add_argument("--tokens", type=int, default=512, help="length of a sequence (default: %(default)s)")
parser.add_argument("--seconds", type=float, default=15, help="the budget of the search (default: %(default)s)")
parser.add_argument("--output", type=Path, help="folder for configs and the journal (default: a temporary one)")


def show(folder: Path) -> None:
    files = sorted((folder / "configs").rglob("*.json"))
    if not files:
        print("Nothing was better than the default tiles, so nothing was written.")
    for file in files:
        print(f"{file.relative_to(folder)}:")
        for entry in json.loads(file.read_text())["entries"]:
            evidence = entry["evidence"]
            gain = f"{evidence['default_us']:.2f} -> {evidence['us']:.2f} µs, {evidence['how']}"
            print(f"  {entry['kernel']} {entry['key']}: {entry['tiles']} {entry.get('options', '')} {gain}")
        print(f"To use it: export NSA_TRITON_CONFIG_DIR={file.parent.parent}")


if __name__ == "__main__":  # candidates are tried in processes, which import this file again
    options = parser.parse_args()
    folder = options.output or Path(tempfile.mkdtemp(prefix="nsa-triton-tune-"))
    os.environ["NSA_TRITON_CACHE_DIR"] = str(folder / "cache")  # journals are kept there: run it again to go on

    from nsa_triton.cli import main

    wanted = ["--chip", options.chip, "--tokens", str(options.tokens), "--budget", str(options.seconds / 60)]
    status = main(["tune", options.op, *wanted, "--output", str(folder / "configs")])
    show(folder)
    raise SystemExit(status)
