"""How long calls take, by the clock of the device that they run on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def microseconds(device: torch.device, calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Of each of the calls, one behind the other: between events on an NPU or a GPU, and on a CPU, whose calls return
    when they are done, by the time of day.

    The host waits for a device at the end only, and prepares the calls while the device still works.
    """
    if device.type == "cpu":
        ends = [time.perf_counter()]
        for call in calls:
            call()
            ends.append(time.perf_counter())
        return [(end - begin) * 1e6 for begin, end in itertools.pairwise(ends)]
    module = getattr(torch, device.type)
    marks = [module.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    module.synchronize()
    return [first.elapsed_time(last) * 1e3 for first, last in itertools.pairwise(marks)]
