"""One scrape: everything collected, and written by prometheus-client.

Lives here: the registry. Imports prometheus-client, so it is imported in a thread.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from vipd.proxy.metrics import kube_proxy, own
from vipd.proxy.metrics.families import Families
from vipd.proxy.metrics.subjects import Subjects
from vipd.proxy.status import Status


class _Daemon(Collector):
    """What is collected from the parts, once."""

    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the families."""
        return self._families.collect()

    def describe(self) -> Iterable[Metric]:
        """Return nothing: no other collector has our names."""
        return ()


def text(subjects: Subjects, status: Status) -> bytes:
    """Return all metrics in the text format."""
    families = Families(status.mode)
    kube_proxy.collect(families, subjects)
    own.collect(families, subjects, status)
    registry = CollectorRegistry()
    registry.register(_Daemon(families))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return generate_latest(registry)
