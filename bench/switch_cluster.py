"""The cluster of `vipd bench switch`: the services that the load asks, and others beside them.

Lives here: their manifests, their addresses, and what each host of the lab asks of them. Pure.
The loaded services have every address that a Service can have, in both IP families, with the lab's
echo servers on both nodes as endpoints.
"""

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from typing import Literal

from vipd.bench import sync_cluster
from vipd.bench.lab_topology import Host, Role, Topology
from vipd.bench.load_work import Target, Work
from vipd.bench.pod import TCP_PORT, UDP_PORT
from vipd.proxy.names import Family

LOADED = 3
"""Services that are asked. Several, because flows of one endpoint by different addresses may meet
in one source port."""
MOST_SERVICES = 59_000
_PORTS = (("tcp", "TCP", 80, TCP_PORT), ("udp", "UDP", 53, UDP_PORT))
_FIRST_NODE_PORT = 31_000

Object = dict[str, object]


def cluster_ips(number: int) -> tuple[str, str]:
    """Return the cluster IPs of a loaded service, behind those of all others."""
    return (f"10.96.250.{number + 1}", f"fd00:10:96::fa{number + 1:02x}")


def outside_ips(number: int) -> tuple[str, str]:
    """Return the load-balancer IPs of a loaded service."""
    return (f"203.0.113.{number + 1}", f"2001:db8:113::{number + 1:x}")


def node_port(number: int, protocol: str) -> int:
    """Return the node port of a loaded service for `tcp` or `udp`."""
    return _FIRST_NODE_PORT + 2 * number + (protocol == "udp")


def pods(topology: Topology) -> tuple[Host, ...]:
    """Return the pods that are endpoints of every loaded service."""
    return tuple(one for one in topology.of_role(Role.POD) if one.name.startswith("web-"))


def nodes(topology: Topology) -> bytes:
    """Return the nodes as one List."""
    return sync_cluster.listed([_node(host) for host in topology.of_role(Role.NODE)])


def services(topology: Topology, others: int = 0) -> bytes:
    """Return the loaded services and so many others of five endpoints each, as one List."""
    items: list[Object] = []
    for number in range(LOADED):
        items += _loaded(number, pods(topology))
    for number in range(others):
        first = number * 5
        endpoints: list[IPv4Address] = [
            sync_cluster.endpoint_address(first + step) for step in range(5)
        ]
        address = sync_cluster.service_address(number)
        items += sync_cluster.objects(f"svc-{number}", address, endpoints)
    return sync_cluster.listed(items)


def _node(host: Host) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": host.name},
        "spec": {"podCIDRs": [str(one) for one in host.pods]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": str(one)} for one in host.addresses]
        },
    }


def _loaded(number: int, endpoints: Sequence[Host]) -> Iterator[Object]:
    name = f"loaded-{number}"
    ips = cluster_ips(number)
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "bench"},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": ips[0],
            "clusterIPs": list(ips),
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "ports": [
                {
                    "name": port_name,
                    "protocol": protocol,
                    "port": port,
                    "targetPort": target,
                    "nodePort": node_port(number, port_name),
                }
                for port_name, protocol, port, target in _PORTS
            ],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": one} for one in outside_ips(number)]}},
    }
    for family in Family:
        yield _slice(name, family, endpoints)


def _slice(service: str, family: Family, endpoints: Sequence[Host]) -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service}-{family}".lower(),
            "namespace": "bench",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": str(family),
        "ports": [
            {"name": port_name, "port": target, "protocol": protocol}
            for port_name, protocol, _, target in _PORTS
        ],
        "endpoints": [
            {
                "addresses": [str(one.address(family))],
                "nodeName": one.node,
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "targetRef": {"kind": "Pod", "namespace": "bench", "name": one.name},
            }
            for one in endpoints
        ],
    }


def works(
    topology: Topology,
    rate: float | None,
    *,
    kept: int = 8,
    hosts: Sequence[str] = ("client-1", "outside", "node"),
    patience_seconds: float = 3.0,
) -> tuple[Work, ...]:
    """Return what the hosts do together: a client pod, the outside, and the node itself.

    `rate` is of new TCP connections a second on all hosts together; None is as many as can be.
    `kept` is how many TCP connections and how many UDP flows each host keeps, of each kind.
    """
    share = None if rate is None else rate / len(hosts)
    # New UDP flows are remembered for 30 s each, so they are fewer.
    udp = 20.0 if share is None else share / 5
    return tuple(
        Work(
            host=host,
            targets=tuple(_targets(topology, host)),
            pods=tuple(one.name for one in pods(topology)),
            tcp_rate=share,
            udp_rate=udp,
            patience_seconds=patience_seconds,
            kept_tcp=kept,
            downloads=2,
            idle_tcp=kept,
            kept_udp=kept,
            idle_udp=kept,
        )
        for host in hosts
    )


def _targets(topology: Topology, host: str) -> Iterator[Target]:
    """Cluster IPs for those inside the cluster, the other addresses for those outside."""
    node = topology.host(topology.proxy_node)
    for number in range(LOADED):
        for name, _, port, _ in _PORTS:
            protocol: Literal["tcp", "udp"] = "udp" if name == "udp" else "tcp"
            if host == "outside":
                for address in outside_ips(number):
                    yield Target(address, port, protocol)
                for own in node.addresses:
                    yield Target(str(own), node_port(number, name), protocol)
            else:
                for address in cluster_ips(number):
                    yield Target(address, port, protocol)
