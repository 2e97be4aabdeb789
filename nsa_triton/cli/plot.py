"""Draw the results of `nsa-triton bench`: latency over length, speed-up over dense attention, roofline, decode bytes.

Every picture is a PNG in a light and a dark version, beside the CSV files that it is made of, or below --output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nsa_triton.cli.bench import bench_module, results_folder
from nsa_triton.cli.view import print_json

EXAMPLE = "nsa-triton plot --results bench/results --output pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, metavar="DIR", help="the --output of nsa-triton bench")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the pictures (default: the results)")


def run(options: argparse.Namespace) -> int:
    results = options.results or results_folder()
    pictures = bench_module("plot").plot_all(results, options.output or results)
    if options.json:
        print_json([str(picture) for picture in pictures])
    else:
        for picture in pictures:
            print(f"wrote {picture}")
    return 0
