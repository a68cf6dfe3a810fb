"""What parts of the daemon count and measure, in a form that costs nothing to import.

Lives here: the one type that a plain number is not enough for. Must not: know how it is shown
(the metrics do, when somebody asks).
"""

from bisect import bisect_left
from collections.abc import Sequence


class Distribution:
    """How often a quantity came into each of some ranges: a histogram of Prometheus.

    `bounds` are the upper ends of the ranges, rising, each within its range.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """For each range; the last is of what is greater than all bounds."""
        self.total = 0.0
        """Sum of what was observed."""

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


SYNC_SECONDS = tuple(0.001 * 2**power for power in range(15))
"""Ranges for the time of a sync, as kube-proxy's (pkg/proxy/metrics/metrics.go, v1.36)."""
