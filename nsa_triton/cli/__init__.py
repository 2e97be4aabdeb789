"""The command line: nsa-triton check | compile | simulate | tune | bench | plot | ops | env."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import nsa_triton
from nsa_triton.cli import bench, check, compile, env, ops, plot, simulate, tune
from nsa_triton.errors import NsaError

COMMANDS = {
    "check": check,
    "compile": compile,
    "simulate": simulate,
    "tune": tune,
    "bench": bench,
    "plot": plot,
    "ops": ops,
    "env": env,
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="nsa-triton",
        description="Native Sparse Attention kernels for Ascend NPUs, verifiable on any machine.",
        epilog="example: nsa-triton check",
    )
    top.add_argument("--version", action="version", version=f"nsa-triton {nsa_triton.__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="show what is compiled and which configs are used")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        description = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=description.splitlines()[0],
            description=description,
            epilog=f"example: {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        return int(COMMANDS[options.command].run(options))
    except NsaError as error:
        print(f"nsa-triton {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"nsa-triton {options.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stderr.close()
        return 0
