"""Run the programs that the Ascend compilers consist of."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nsa_triton.errors import CompileError, ToolchainError

TIMEOUT = 300.0  # seconds; a compile takes 0.1 to 0.5
logger = logging.getLogger("nsa_triton")

Answer = TypeVar("Answer")


def run_tool(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """What the program answers. Its status is negative where a signal ended it, twice."""
    tool = Path(command[0]).name

    def answer() -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, **more)
        if done.returncode < 0:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done

    try:
        return once_more(tool, answer)
    except subprocess.CalledProcessError as error:
        return subprocess.CompletedProcess(command, error.returncode, error.stdout, error.stderr)
    except subprocess.TimeoutExpired as error:
        log = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else str(error.stderr or "")
        raise CompileError(f"{tool} did not end within {TIMEOUT:.0f} seconds", log) from error
    except OSError as error:
        raise ToolchainError(f"{command[0]} does not run: {error}") from error


def once_more(tool: str, answer: Callable[[], Answer]) -> Answer:
    """`answer()`; asked a second time, with a warning, where a signal ended the program or it did not start.

    In some ten thousand compiles that happens once by chance, and again for the same kernel it does not: believed at
    once, it would refuse a kernel that compiles. A program that crashes because of the kernel crashes twice.
    """
    try:
        return answer()
    except subprocess.CalledProcessError as error:
        if error.returncode >= 0:
            raise
        why = f"was ended by signal {-error.returncode}"
    except OSError as error:
        why = f"did not start: {error}"
    logger.warning("%s %s; it runs once more", tool, why)
    return answer()
