"""What a running daemon says that it counts.

Lives here: its metrics as Prometheus reads them, and what is counted of one service.
"""

from prometheus_client.parser import text_string_to_metric_families
from tests.netns.cluster import Cluster, Served

Labels = dict[str, str]


def samples(cluster: Cluster) -> list[tuple[str, Labels, float]]:
    families = text_string_to_metric_families(
        cluster.cli("metrics", "--socket", cluster.socket).stdout
    )
    return [(one.name, one.labels, one.value) for family in families for one in family.samples]


def sums(cluster: Cluster, served: Served) -> dict[str, float]:
    """What is counted of a service: by the short name of the metric, and why it was refused."""
    found: dict[str, float] = {}
    for name, labels, value in samples(cluster):
        if labels.get("service") == served.name:
            assert labels["protocol"] == served.flavour.protocol
            what = labels.get("why", name.removeprefix("vipd_").removesuffix("_total"))
            found[what] = found.get(what, 0) + value
    return found


def counted(cluster: Cluster, served: Served, connections: int) -> bool:
    found = sums(cluster, served)
    assert found.get("service_connections", 0) <= connections
    return (
        found.get("service_connections") == found.get("endpoint_connections") == float(connections)
    )
