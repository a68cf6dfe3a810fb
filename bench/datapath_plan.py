"""What `vipd bench datapath` measures, on what, in which order, and what must come out. Pure.

Lives here: the names of variants, measures and figures, ports and addresses, the targets. Must not:
start anything.
"""

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct

from vipd.bench import sync_cluster

DIRECT, USERSPACE, HAPROXY = "direct", "userspace", "haproxy"
VARIANTS = (DIRECT, "nftables", "iptables", "ipvs", USERSPACE, HAPROXY)
"""In the order of the table. Those that are neither direct nor haproxy are modes of vipd."""
FORWARDERS = (USERSPACE, HAPROXY)
"""Variants whose bytes pass through processes, whose processor time therefore says something."""
CLIENT, NODE, SERVER = "client-1", "node", "web-1"
"""Hosts of the lab: both pods are on the node, so that nothing but the proxy is between them."""
CONNECTIONS_EACH = 32
"""Of wrk, for each worker."""
MOST_SERVICES = 59_000
MOST_IDLE = 50_000
"""Fewer than the client has source ports."""


class Measure(StrEnum):
    """What one turn of a variant consists of, in this order."""

    MEMORY = "memory"
    BULK = "bulk"
    KEPT = "kept"
    LATENCY = "latency"
    NEW = "new"
    UDP = "udp"


class Figure(Struct, frozen=True, kw_only=True):
    """One row of the table."""

    name: str
    measure: str
    title: str
    unit: str
    digits: int
    """Behind the decimal point."""
    of_forwarders: bool = False
    """Whether it is about the proxy's processes, so that nothing is to be had of other variants."""


FIGURES = (
    Figure(name="bulk", measure=Measure.BULK, title="bulk", unit="Gbit/s", digits=2),
    Figure(
        name="bulk_cpu",
        measure=Measure.BULK,
        title="CPU each Gbit, machine",
        unit="ms",
        digits=1,
    ),
    Figure(
        name="bulk_cpu_proxy",
        measure=Measure.BULK,
        title="CPU each Gbit, proxy",
        unit="ms",
        digits=1,
        of_forwarders=True,
    ),
    Figure(name="kept", measure=Measure.KEPT, title="kept connections", unit="req/s", digits=0),
    Figure(
        name="kept_cpu",
        measure=Measure.KEPT,
        title="CPU each 1000 req, machine",
        unit="ms",
        digits=1,
    ),
    Figure(
        name="kept_cpu_proxy",
        measure=Measure.KEPT,
        title="CPU each 1000 req, proxy",
        unit="ms",
        digits=1,
        of_forwarders=True,
    ),
    Figure(name="p50", measure=Measure.LATENCY, title="half load p50", unit="µs", digits=0),
    Figure(name="p99", measure=Measure.LATENCY, title="half load p99", unit="µs", digits=0),
    Figure(name="new", measure=Measure.NEW, title="new connections", unit="/s", digits=0),
    Figure(name="udp", measure=Measure.UDP, title="UDP answers", unit="/s", digits=0),
    Figure(name="udp_lost", measure=Measure.UDP, title="UDP lost", unit="%", digits=2),
    Figure(name="rss", measure=Measure.MEMORY, title="memory, idle (RSS)", unit="MB", digits=1),
    Figure(name="pss", measure=Measure.MEMORY, title="memory, idle (PSS)", unit="MB", digits=1),
    Figure(
        name="rss_proxy",
        measure=Measure.MEMORY,
        title="of it, forwarding (RSS)",
        unit="MB",
        digits=1,
        of_forwarders=True,
    ),
    Figure(
        name="pss_proxy",
        measure=Measure.MEMORY,
        title="of it, forwarding (PSS)",
        unit="MB",
        digits=1,
        of_forwarders=True,
    ),
    Figure(
        name="rss_each",
        measure=Measure.MEMORY,
        title="RSS each idle connection",
        unit="KB",
        digits=2,
        of_forwarders=True,
    ),
)


class Target(Struct, frozen=True):
    """What the ratio userspace to haproxy of a figure must reach, and is meant to reach."""

    must: float
    aim: float
    at_least: bool
    """False where less is better, so that the ratio must not be above."""

    def verdict(self, ratio: float) -> str:
        """Return `aim`, `must` or `missed`."""
        for word, bound in (("aim", self.aim), ("must", self.must)):
            if ratio >= bound if self.at_least else ratio <= bound:
                return word
        return "missed"

    def spelled(self, bound: float) -> str:
        """Return a bound as it is written, such as `≥ 0.8`."""
        return f"{'≥' if self.at_least else '≤'} {bound:g}"


TARGETS = {
    "bulk": Target(1.0, 1.3, True),
    "kept": Target(0.8, 1.0, True),
    "new": Target(0.5, 0.7, True),
    "p99": Target(1.5, 1.0, False),
    "pss": Target(1.5, 1.0, False),
    "pss_proxy": Target(1.5, 1.0, False),
}
"""Memory as PSS: three processes share pages, which RSS would count three times. The same for all
of it as for that of the processes that forward: vipd has a daemon besides, which is there in every
mode, and HAProxy has nobody who would write its configuration."""


class Plan(Struct, frozen=True, kw_only=True):
    """What a user asked for."""

    variants: tuple[str, ...]
    measures: tuple[Measure, ...]
    rounds: int
    seconds: int
    """Length of each measure; wrk and iperf3 take whole ones."""
    idle: int
    """Connections that are open while memory is read."""
    services: int
    """Virtual servers beside the one that is measured."""
    workers: int
    """Threads of HAProxy and of the generators; vipd takes as many workers as there are cores."""


def measures(wanted: Sequence[Measure]) -> tuple[Measure, ...]:
    """Return them in order, with `kept` where `latency` is wanted: it needs its rate."""
    needed = {*wanted, Measure.KEPT} if Measure.LATENCY in wanted else set(wanted)
    return tuple(one for one in Measure if one in needed)


def order(variants: Sequence[str], turn: int) -> tuple[str, ...]:
    """Return the variants of a round, counted from 0: another one begins each time."""
    first = turn % len(variants) if variants else 0
    return (*variants[first:], *variants[:first])


class Asked(Struct, frozen=True):
    """Where a client asks: one address and the ports of HTTP, iperf3 and UDP there."""

    address: str
    http: int
    bulk: int
    udp: int


SERVICE_ADDRESS = "10.96.250.1"
"""Behind those of all other services, as in `vipd bench switch`."""
SERVICE_PORTS = (("http", "TCP", 80, 8000), ("bulk", "TCP", 5201, 5201), ("udp", "UDP", 53, 5301))
"""Name, protocol, port and port of the endpoint. The echo server has 8080, 9000 and 5300."""


def asked(variant: str, endpoint: str) -> Asked:
    """Return where the client asks: the service, or with `direct` the endpoint itself."""
    if variant == DIRECT:
        return Asked(endpoint, *(target for *_, target in SERVICE_PORTS))
    return Asked(SERVICE_ADDRESS, *(port for _, _, port, _ in SERVICE_PORTS))


def manifests(endpoint: str, others: int) -> bytes:
    """Return the measured service and so many others of five endpoints each, as one List."""
    items: list[dict[str, object]] = [_service(), _slice(endpoint)]
    for number in range(others):
        addresses = [sync_cluster.endpoint_address(number * 5 + step) for step in range(5)]
        address = sync_cluster.service_address(number)
        items += sync_cluster.objects(f"svc-{number}", address, addresses)
    return sync_cluster.listed(items)


def _service() -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "measured", "namespace": "bench"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": SERVICE_ADDRESS,
            "clusterIPs": [SERVICE_ADDRESS],
            "ipFamilies": ["IPv4"],
            "ports": [
                {"name": name, "protocol": protocol, "port": port, "targetPort": target}
                for name, protocol, port, target in SERVICE_PORTS
            ],
        },
    }


def _slice(endpoint: str) -> dict[str, object]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "measured-abcde",
            "namespace": "bench",
            "labels": {"kubernetes.io/service-name": "measured"},
        },
        "addressType": "IPv4",
        "ports": [
            {"name": name, "port": target, "protocol": protocol}
            for name, protocol, _, target in SERVICE_PORTS
        ],
        "endpoints": [
            {
                "addresses": [endpoint],
                "nodeName": NODE,
                "conditions": {"ready": True, "serving": True, "terminating": False},
            }
        ],
    }


def most_connections(plan: Plan) -> int:
    """Return how many connections HAProxy may have: the idle ones, or those under load."""
    return max(plan.idle, plan.workers * CONNECTIONS_EACH + 100) + 20


def descriptors(plan: Plan) -> int:
    """Return the open files of HAProxy, which has everything in one process: it wants two for each
    connection that it may have, and refuses to start where it cannot have them."""
    return 2 * most_connections(plan) + plan.services + 8 * plan.workers + 50


def haproxy_configuration(endpoint: str, plan: Plan) -> str:
    """Return what HAProxy reads: the TCP ports of the service, and the other services.

    Otherwise its defaults, but for timeouts, which would end idle connections.
    """
    lines = [
        "global",
        f"    nbthread {plan.workers}",
        f"    maxconn {most_connections(plan)}",
        "defaults",
        "    mode tcp",
        "    timeout connect 5s",
        "    timeout client 1h",
        "    timeout server 1h",
    ]
    for name, protocol, port, target in SERVICE_PORTS:
        if protocol == "TCP":
            lines += _listen(name, f"{SERVICE_ADDRESS}:{port}", [f"{endpoint}:{target}"])
    for number in range(plan.services):
        address = f"{sync_cluster.service_address(number)}:{sync_cluster.PORT}"
        first = number * 5
        servers = [
            f"{sync_cluster.endpoint_address(first + step)}:{sync_cluster.TARGET_PORT}"
            for step in range(5)
        ]
        lines += _listen(f"svc-{number}", address, servers)
    return "".join(f"{line}\n" for line in lines)


def _listen(name: str, address: str, servers: Sequence[str]) -> list[str]:
    return [
        f"listen {name}",
        f"    bind {address}",
        *(f"    server s{number} {server}" for number, server in enumerate(servers)),
    ]
