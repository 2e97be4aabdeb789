"""Every error this package raises on purpose.

A message always says which argument (or tool) is at fault, what was expected, what came, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


class NsaError(Exception):
    """Base class of all errors raised by nsa_triton."""


class ArgumentError(NsaError):
    """A bad argument; raised before any kernel runs and before anything is written."""

    def __init__(self, argument: str, expected: str, got: object, hint: str = "") -> None:
        self.argument, self.expected, self.got, self.hint = argument, expected, got, hint
        super().__init__(f"{argument}: expected {expected}, got {got}" + (f". {hint}" if hint else ""))


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of the wrong Python type or dtype."""


class ArgumentValueError(ArgumentError, ValueError, RuntimeError):
    """An argument of the right type with an illegal value.

    It is both a ValueError (what Python programmers expect) and a RuntimeError (what torch_npu raises and MindSpore
    documents), so that code written against either keeps working.
    """


class ToolchainError(NsaError, RuntimeError):
    """A tool that the chosen target needs is missing, clobbered or too old."""

    def __init__(self, problem: str, commands: Sequence[str] = ()) -> None:
        self.problem, self.commands = problem, tuple(commands)
        repair = "".join(f"\n    {command}" for command in self.commands)
        super().__init__(problem + (f"\nTo repair it, run:{repair}" if repair else ""))


class CompileError(NsaError, RuntimeError):
    """A kernel was rejected by a compiler; `log` holds all that the compiler printed."""

    def __init__(self, message: str, log: str = "") -> None:
        self.log = log
        super().__init__(message)


class CacheFullError(NsaError, RuntimeError):
    """A cache has too few free pages for new tokens; nothing was changed."""


class ConfigError(NsaError, ValueError):
    """A file under autotune_configs, or a setting, that cannot be used."""
