"""How tests with random examples run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def fuzzed(examples: int) -> settings:
    """So many examples, the same ones each time. Fixtures that they share, such as the device, keep nothing of them."""
    health = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=health)
