"""The clock: how long a call takes with cold and with warm caches, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nsa_triton.ascend.simulator.costs import parameters
from nsa_triton.runtime.clock import microseconds
from nsa_triton.runtime.target import target_of

MOST_FLUSHED = 512 << 20  # bytes; virtual machines report the cache of the whole socket
UNKNOWN_CACHE = 64 << 20


class Clock:
    """Times calls on a device, behind a buffer that is larger than its caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = min(MOST_FLUSHED, 2 * cache_bytes(device))
        self._larger_than_cache = torch.empty(size // 4, dtype=torch.int32, device=device)

    def cold_and_warm(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Microseconds of a call whose inputs are in no cache, and of the next one."""
        self._larger_than_cache.zero_()
        cold, warm = microseconds(self.device, [call, call])
        return cold, warm

    def once(self, call: Callable[[], Any]) -> float:
        """Microseconds of a call, whatever is in the caches."""
        return microseconds(self.device, [call])[0]


def cache_bytes(device: torch.device) -> int:
    """The last level of cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    if device.type == "npu":
        chips = parameters()["chips"]
        largest = max(chip["l2_mib"] for chip in chips.values())
        return int(chips.get(target_of(device).name, {"l2_mib": largest})["l2_mib"]) << 20
    sizes = [_kilobytes(file.read_text()) for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=UNKNOWN_CACHE)


def _kilobytes(text: str) -> int:
    """Linux writes 32768K."""
    return int(text.strip().rstrip("K")) << 10


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest of the values, so that each printed time is one that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
