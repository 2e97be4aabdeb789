"""Where candidates are evaluated: in this process, in several, or on the nodes of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol

import torch

from nsa_triton.errors import ArgumentValueError, ToolchainError
from nsa_triton.settings import VARIABLES
from nsa_triton.tuning.evaluation import evaluate
from nsa_triton.tuning.sweep import Candidate, Sweep, Verdict


class Workers(Protocol):
    """`size` candidates at a time."""

    size: int

    def submit(self, sweep: Sweep, candidate: Candidate) -> Future[Verdict]: ...


class Here:
    """One after the other, in this process."""

    size = 1

    def submit(self, sweep: Sweep, candidate: Candidate) -> Future[Verdict]:
        done: Future[Verdict] = Future()
        done.set_result(evaluate(sweep, candidate))
        return done


class Processes:
    def __init__(self, pool: ProcessPoolExecutor, size: int) -> None:
        self.pool, self.size = pool, size

    def submit(self, sweep: Sweep, candidate: Candidate) -> Future[Verdict]:
        return self.pool.submit(evaluate, sweep, candidate)


class OnRay:
    def __init__(self, ray: Any) -> None:
        self.size = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._evaluate = ray.remote(num_cpus=1)(_evaluate_on_one_thread)

    def submit(self, sweep: Sweep, candidate: Candidate) -> Future[Verdict]:
        found: Future[Verdict] = self._evaluate.remote(sweep, candidate).future()
        return found


def _evaluate_on_one_thread(sweep: Sweep, candidate: Candidate) -> Verdict:
    torch.set_num_threads(1)
    return evaluate(sweep, candidate)


def checked(wanted: str | None) -> str | None:
    """ "ray", or a number as text; an error before any work is done."""
    if wanted in (None, "ray") or (wanted.isdigit() and int(wanted) > 0):
        return wanted
    raise ArgumentValueError("--workers", "an integer, at least 1, or ray", repr(wanted))


@contextmanager
def workers(wanted: str | None, *, simulated: bool) -> Iterator[Workers]:
    """`wanted`: how many, or "ray"; None for one per core where times are simulated. What is measured is measured
    alone."""
    if not simulated:
        if wanted not in (None, "1"):
            raise ArgumentValueError("--workers", "1 on a chip that is measured: others would disturb it", wanted)
        yield Here()
    elif wanted == "ray":
        with _ray() as ray:
            yield OnRay(ray)
    else:
        size = int(wanted) if wanted else os.cpu_count() or 1
        if size == 1:
            yield Here()
            return
        with _processes(size) as pool:
            yield Processes(pool, size)


@contextmanager
def _processes(size: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(size, mp_context=get_context("spawn"), initializer=_begin_process)
    try:
        yield pool
    finally:
        # Who leaves early does not wait for candidates that take a minute.
        running = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()


def _begin_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children
    torch.set_num_threads(1)


@contextmanager
def _ray() -> Iterator[Any]:
    """Ray, connected to the cluster that RAY_ADDRESS names, or to a local one that is started for this sweep."""
    try:
        import ray
    except ImportError as error:
        raise ToolchainError("ray is not installed", ("pip install 'nsa_triton[ray]'",)) from error
    mine = not ray.is_initialized()
    if mine:
        settings = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": settings})
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()
