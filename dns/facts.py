"""What DNS needs to know of a Service, a Pod and the namespaces: small, and easy to send.

Lives here: the facts, and how they follow from the objects of the snapshot. Two Services with equal
facts have the same records, so a change that leaves the facts alone need not be sent. Pure.
Must not: make names or records (service_names.py), nor keep anything (zone.py).
Addresses are packed: 4 bytes or 16, in network order.
"""

from enum import IntEnum

from msgspec import Struct

from vipd.dns.names import is_label
from vipd.proxy.model import EndpointSlice, Pod, Service, ServiceType
from vipd.proxy.names import NamespacedName, Protocol

Port = tuple[str, str, int]
"""Name (empty for the one without), protocol in lower case, number."""


class Kind(IntEnum):
    """What a Service's name stands for."""

    CLUSTER = 0
    """Its cluster IPs."""
    HEADLESS = 1
    """Its ready endpoints."""
    EXTERNAL = 2
    """Another name."""


class EndpointFacts(Struct, frozen=True, array_like=True):
    """The ready endpoints of one slice, and the ports that all of them have.

    `hostnames` is empty where no endpoint has one, otherwise as long as `addresses`, with empty
    texts for those that have none.
    """

    ports: tuple[Port, ...] = ()
    addresses: tuple[bytes, ...] = ()
    hostnames: tuple[str, ...] = ()


class ServiceFacts(Struct, frozen=True, array_like=True):
    """A Service. What a kind has no use for is empty: `endpoints` are a headless Service's."""

    namespace: str
    name: str
    kind: Kind = Kind.CLUSTER
    cluster_ips: tuple[bytes, ...] = ()
    ports: tuple[Port, ...] = ()
    endpoints: tuple[EndpointFacts, ...] = ()
    external_name: str = ""

    @property
    def key(self) -> NamespacedName:
        """Namespace and name."""
        return NamespacedName(self.namespace, self.name)


class PodFacts(Struct, frozen=True, array_like=True):
    """A live Pod and its addresses; needed where pod names are verified."""

    namespace: str
    name: str
    addresses: tuple[bytes, ...] = ()

    @property
    def key(self) -> NamespacedName:
        """Namespace and name."""
        return NamespacedName(self.namespace, self.name)


def facts_of(service: Service, slices: tuple[EndpointSlice, ...]) -> ServiceFacts | None:
    """Return the facts of a Service, None where its name cannot be one label of a domain name."""
    namespace, name = service.name.namespace, service.name.name
    if not (is_label(namespace) and is_label(name)):
        return None
    if service.type is ServiceType.EXTERNAL_NAME:
        return ServiceFacts(namespace, name, Kind.EXTERNAL, external_name=service.external_name)
    if service.headless and not service.cluster_ips:
        found = [_endpoints(one) for one in slices]
        ready = tuple([one for one in found if one.addresses])
        return ServiceFacts(namespace, name, Kind.HEADLESS, endpoints=ready)
    return ServiceFacts(
        namespace,
        name,
        cluster_ips=tuple([each.packed for each in service.cluster_ips]),
        ports=tuple([(port.name, _PROTOCOL[port.protocol], port.port) for port in service.ports]),
    )


def facts_of_pod(pod: Pod) -> PodFacts | None:
    """Return the facts of a Pod, None if it has no address or ends: its name is nobody's then."""
    if pod.finished or pod.terminating or not pod.ips:
        return None
    return PodFacts(pod.name.namespace, pod.name.name, tuple([each.packed for each in pod.ips]))


def _endpoints(one: EndpointSlice) -> EndpointFacts:
    ready = [each for each in one.endpoints if each.ready]
    named = any(each.hostname for each in ready)
    return EndpointFacts(
        tuple([(port.name, _PROTOCOL[port.protocol], port.port) for port in one.ports]),
        tuple([each.address.packed for each in ready]),
        tuple([each.hostname or "" for each in ready]) if named else (),
    )


_PROTOCOL = {one: one.value.lower() for one in Protocol}
