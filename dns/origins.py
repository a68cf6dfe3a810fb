"""Which object a record came from, and why an address has none.

Lives here: the way back from records of one Service to its slices, endpoints and Pods. Pure.
Must not: find names (tracing.py), or decide what stands at one (service_names.py does).
"""

from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from msgspec import Struct

from vipd.dns.names import address_in, dashed, text_of
from vipd.dns.records import RRset, Type
from vipd.proxy.model import EndpointSlice, Service, ServiceType, SliceEndpoint
from vipd.proxy.names import Address

MOST_TOLD = 50
"""Endpoints of which is said why they are missing."""


class Origin(Struct, frozen=True):
    """A record, and where it came from."""

    record: str
    """Type and data as in a zone file: ``A 10.96.0.1``."""
    source: str


class Missing(Struct, frozen=True):
    """What one might expect in the answer, and why it is not there."""

    what: str
    why: str


class Behind(NamedTuple):
    """An endpoint and the slice that has it."""

    slice: EndpointSlice
    endpoint: SliceEndpoint

    def __str__(self) -> str:
        pod = f", Pod {self.slice.name.namespace}/{self.endpoint.pod}" if self.endpoint.pod else ""
        node = f" on {self.endpoint.node}" if self.endpoint.node else ""
        return f"EndpointSlice {self.slice.name}{pod}{node}"


def texts(rrset: RRset) -> Iterator[tuple[str, bytes]]:
    """Yield each record as in a zone file, and its data; only types that objects make."""
    for data in rrset.data:
        if rrset.type in (Type.A, Type.AAAA):
            yield f"{Type(rrset.type).name} {ip_address(data)}", data
        elif rrset.type in (Type.CNAME, Type.PTR, Type.NS):
            yield f"{Type(rrset.type).name} {text_of(data)}", data
        elif rrset.type == Type.SRV:
            numbers = [int.from_bytes(data[at : at + 2]) for at in (0, 2, 4)]
            yield f"SRV {' '.join(map(str, numbers))} {text_of(data[6:])}", data


def endpoints(slices: Sequence[EndpointSlice]) -> list[Behind]:
    """Return all endpoints of slices."""
    return [Behind(one, endpoint) for one in slices for endpoint in one.endpoints]


def of_service(
    service: Service, slices: Sequence[EndpointSlice], rrset: RRset, protocol: str = ""
) -> tuple[Origin, ...]:
    """Return where the records at a name of a Service came from.

    `protocol` is that of the name (TCP), for SRV; empty: the name has none.
    """
    return tuple(
        [
            Origin(text, _source(service, slices, rrset.type, data, protocol))
            for text, data in texts(rrset)
        ]
    )


def _source(
    service: Service, slices: Sequence[EndpointSlice], kind: int, data: bytes, protocol: str
) -> str:
    said = f"Service {service.name}"
    if kind == Type.CNAME:
        return f"{said}, spec.externalName"
    if not is_headless(service):
        if kind == Type.SRV:
            number = int.from_bytes(data[4:6])
            ports = [
                one.name or "without a name"
                for one in service.ports
                if one.port == number and protocol in ("", one.protocol.value)
            ]
            return f"{said}, port {' or '.join(dict.fromkeys(ports))}"
        return f"{said}, spec.clusterIPs"
    ready = [one for one in endpoints(slices) if one.endpoint.ready]
    if kind == Type.SRV:
        label, number = data[7 : 7 + data[6]], int.from_bytes(data[4:6])
        ready = [
            one
            for one in ready
            if label_of(one.endpoint) == label
            and any(port.port == number for port in one.slice.ports)
        ]
    else:
        ready = [one for one in ready if one.endpoint.address.packed == data]
    return "; ".join(dict.fromkeys(map(str, ready))) or said


def is_headless(service: Service) -> bool:
    """Return whether its names are those of its endpoints."""
    return service.headless and not service.cluster_ips


def label_of(endpoint: SliceEndpoint) -> bytes:
    """Return the label that an endpoint of a headless Service stands under."""
    if endpoint.hostname:
        return endpoint.hostname.lower().encode()
    return dashed(endpoint.address.packed)


def missing(
    service: Service, slices: Sequence[EndpointSlice], below: Sequence[bytes], kind: int
) -> Iterator[Missing]:
    """Yield what is not in an answer and why, at most MOST_TOLD.

    `below` are the labels before the Service's own, the nearest first.
    """
    found = _missing(service, slices, below, kind)
    for told, one in enumerate(found):
        if told == MOST_TOLD:
            yield Missing("…", "and more")
            return
        yield one


def _missing(
    service: Service, slices: Sequence[EndpointSlice], below: Sequence[bytes], kind: int
) -> Iterator[Missing]:
    if service.type is ServiceType.EXTERNAL_NAME:
        if below:
            yield Missing("the name", f"Service {service.name} is ExternalName: it has none below")
        return
    wanted = _FAMILY_OF.get(kind)
    if below[:1] and below[0].startswith(b"_"):
        yield from _ports(service, slices, below)
    if not is_headless(service):
        yield from _cluster_ips(service, wanted)
        if below and not below[0].startswith(b"_"):
            why = f"Service {service.name} is not headless: its endpoints have no names"
            yield Missing("the name", why)
        return
    if not any(one.endpoints for one in slices):
        yield Missing("every address", f"no EndpointSlice of Service {service.name} has endpoints")
    host = below[0] if below and not below[0].startswith(b"_") else None
    for one in endpoints(slices):
        if host is not None and label_of(one.endpoint) != host:
            # One that is not the one that was asked for; its name may be meant all the same.
            if address_in(host) == one.endpoint.address.packed:
                label = label_of(one.endpoint).decode()
                yield Missing(str(one.endpoint.address), f"has a hostname: its name is {label}")
            continue
        why = _why(one, wanted)
        if why:
            yield Missing(str(one.endpoint.address), why)
    if host is not None and not any(label_of(it.endpoint) == host for it in endpoints(slices)):
        some = sorted({label_of(one.endpoint).decode() for one in endpoints(slices)})
        there = ", ".join(some[:5]) + (", …" if len(some) > 5 else "")
        yield Missing("the name", f"no endpoint is called so; there is {there or 'none'}")


def _why(one: Behind, wanted: int | None) -> str:
    endpoint = one.endpoint
    if not endpoint.ready:
        state = "not ready, as it is terminating" if endpoint.terminating else "not ready"
        return f"{state}: {one}"
    if wanted is not None and endpoint.address.version != wanted:
        return f"is in the {_TYPE_OF[endpoint.address.version]} records"
    return ""


_TYPE_OF = {4: "A", 6: "AAAA"}
_FAMILY_OF = {int(Type.A): 4, int(Type.AAAA): 6}


def _cluster_ips(service: Service, wanted: int | None) -> Iterator[Missing]:
    if not service.cluster_ips:
        yield Missing("every address", f"Service {service.name} has no cluster IP (yet)")
    elif wanted is not None and not _of_family(service.cluster_ips, wanted):
        there = ", ".join(map(str, service.cluster_ips))
        why = f"Service {service.name} has no cluster IP of that family: spec.clusterIPs is {there}"
        yield Missing(f"every IPv{wanted} address", why)


def _of_family(addresses: Sequence[Address], version: int) -> bool:
    return any(one.version == version for one in addresses)


def _ports(
    service: Service, slices: Sequence[EndpointSlice], below: Sequence[bytes]
) -> Iterator[Missing]:
    """Yield why there is no port of that name; `below` are its protocol and name."""
    protocol = below[0][1:].decode("latin-1").upper()
    name = below[1][1:].decode("latin-1") if len(below) > 1 else ""
    if is_headless(service):
        for one in slices:
            known = [(port.name, port.protocol.value) for port in one.ports]
            if name and (name, protocol) not in known and one.endpoints:
                why = f"EndpointSlice {one.name} has no such port; it has {_listed(known)}"
                yield Missing(f"port {name}/{protocol}", why)
        return
    known = [(port.name, port.protocol.value) for port in service.ports]
    if name and (name, protocol) not in known:
        why = f"Service {service.name} has no such port; it has {_listed(known)}"
        yield Missing(f"port {name}/{protocol}", why)


def _listed(ports: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name or '(no name)'}/{protocol}" for name, protocol in ports) or "none"
