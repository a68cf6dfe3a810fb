"""The EndpointSlices of one Service, made from the Pods it selects.

Lives here: which pods are endpoints, with which ports and conditions. Must not: choose the pods
(selection.py), keep anything.
Source: staging/src/k8s.io/endpointslice/{utils,reconciler}.go, trafficdist/trafficdist.go in the
same place, and pkg/api/v1/pod.FindPort, v1.37.
"""

from collections.abc import Iterable, Mapping

from vipd.proxy.model import (
    EndpointSlice,
    Pod,
    Service,
    SliceEndpoint,
    SlicePort,
    TrafficDistribution,
)
from vipd.proxy.names import Family, NamespacedName, family_of

_NONE: frozenset[str] = frozenset()


def pod_slices(
    service: Service, pods: Iterable[Pod], zones: Mapping[str, str]
) -> tuple[EndpointSlice, ...]:
    """Return one slice for each family and each way the pods number the service's ports.

    `pods` are those selected, sorted by name; `zones` is the zone of each node. The slices' names
    contain a ``~``, which no name in the API does.
    """
    groups: dict[tuple[Family, tuple[SlicePort, ...]], list[SliceEndpoint]] = {}
    families = _families(service)
    for pod in pods:
        if pod.finished:
            continue
        ports = _ports(service, pod)
        for family in families:
            first = next((ip for ip in pod.ips if family_of(ip) is family), None)
            if first is None:
                continue
            serving = pod.ready
            ready = service.publish_not_ready or (serving and not pod.terminating)
            zone = zones.get(pod.node) if pod.node else None
            for_zone, for_node = _hints(service, zone, pod.node) if ready else (_NONE, _NONE)
            groups.setdefault((family, ports), []).append(
                SliceEndpoint(
                    address=first,
                    ready=ready,
                    serving=serving,
                    terminating=pod.terminating,
                    node=pod.node,
                    zone=zone,
                    zone_hints=for_zone,
                    node_hints=for_node,
                    hostname=_hostname(service, pod),
                    pod=pod.name.name,
                )
            )
    numbers = dict.fromkeys(families, 0)
    slices: list[EndpointSlice] = []
    for family, ports in sorted(groups, key=_order):
        name = f"{service.name.name}~pods-{family}-{numbers[family]}".lower()
        numbers[family] += 1
        slices.append(
            EndpointSlice(
                name=NamespacedName(service.name.namespace, name),
                service=service.name,
                family=family,
                endpoints=tuple(groups[family, ports]),
                ports=ports,
                headless=service.headless,
            )
        )
    return tuple(slices)


def _hints(
    service: Service, zone: str | None, node: str | None
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the zones and the nodes that an endpoint is preferred for."""
    if service.distribution is TrafficDistribution.ANYWHERE:
        return _NONE, _NONE
    is_for_node = service.distribution is TrafficDistribution.SAME_NODE
    return (
        frozenset([zone]) if zone else _NONE,
        frozenset([node]) if node and is_for_node else _NONE,
    )


def _order(group: tuple[Family, tuple[SlicePort, ...]]) -> tuple[int, list[tuple[str, str, int]]]:
    family, ports = group
    return family.value, [(port.name, port.protocol.value, port.port) for port in ports]


def _families(service: Service) -> tuple[Family, ...]:
    """Return the families that the service has, both where nothing says which."""
    addresses = service.cluster_ips + service.external_ips + service.load_balancer_ips
    found = set(service.families) or {family_of(each) for each in addresses} or set(Family)
    return tuple(sorted(found))


def _ports(service: Service, pod: Pod) -> tuple[SlicePort, ...]:
    """Return the service's ports as this pod numbers them; a name it does not know is left out."""
    found: list[SlicePort] = []
    for port in service.ports:
        number = port.target_port or port.port
        if isinstance(number, str):
            number = next(
                (p.port for p in pod.ports if p.name == number and p.protocol is port.protocol), 0
            )
        if number:
            found.append(SlicePort(port.name, port.protocol, number))
    return tuple(found)


def _hostname(service: Service, pod: Pod) -> str | None:
    same = pod.subdomain == service.name.name and pod.name.namespace == service.name.namespace
    return pod.hostname if pod.hostname and same else None
