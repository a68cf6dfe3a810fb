"""Families of samples in the making.

Lives here: from a described name and a value to what prometheus-client prints. Must not: know
where values come from. Imports prometheus-client, so it is imported in a thread.
"""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from vipd.proxy.measured import Distribution
from vipd.proxy.metrics.described import METRICS, Described

_KINDS = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class Families:
    """The families of one scrape; those that do not belong to the mode are left out."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._made: dict[str, Metric] = {}

    def add(self, name: str, value: float, *labels: object) -> None:
        """Add a sample, with a value for each label in the described order."""
        described = METRICS[name]
        if self._mode in described.modes:
            made = self._family(described)
            if not isinstance(made, CounterMetricFamily | GaugeMetricFamily):
                raise TypeError(name)
            made.add_metric(_texts(described, labels), float(value))

    def distribution(self, name: str, told: Distribution, *labels: object) -> None:
        """Add a histogram."""
        described = METRICS[name]
        if self._mode in described.modes:
            made = self._family(described)
            if not isinstance(made, HistogramMetricFamily):
                raise TypeError(name)
            bounds = (*(f"{one:g}" for one in told.bounds), "+Inf")  # as Go prints them
            buckets = list(zip(bounds, map(float, accumulate(told.counts)), strict=True))
            made.add_metric(_texts(described, labels), buckets, told.total)

    def collect(self) -> Iterator[Metric]:
        """Yield the families, in the order in which they are described."""
        for name in METRICS:
            if name in self._made:
                yield self._made[name]

    def _family(self, described: Described) -> Metric:
        name = described.name
        if name not in self._made:
            kind = _KINDS[described.type]
            self._made[name] = kind(name, described.help, labels=described.labels)
        return self._made[name]


def _texts(described: Described, labels: tuple[object, ...]) -> list[str]:
    if len(labels) != len(described.labels):
        raise ValueError(f"{described.name} has the labels {described.labels}")
    return [str(one) for one in labels]
