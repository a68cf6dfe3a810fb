"""EndpointSlices and Endpoints of the API become EndpointSlices of the model.

Lives here: which endpoints and ports count, what an absent condition means. Must not: know how JSON
is read, or which slices a service uses in the end (resolve.py).
Source: reference kube-proxy.md 1.2; EndpointSlice mirroring for v1 Endpoints, KEP-2438.
"""

from datetime import datetime

import msgspec
from msgspec import Struct

from vipd.proxy.decode_fields import FieldError, address, checked_label, checked_name, shown
from vipd.proxy.decode_raw import (
    AddressType,
    EndpointAddress,
    Metadata,
    RawEndpoint,
    RawEndpoints,
    RawPort,
    RawSlice,
    Reference,
)
from vipd.proxy.decode_service import HEADLESS
from vipd.proxy.model import EndpointSlice, Flaw, SliceEndpoint, SlicePort
from vipd.proxy.names import Address, Family, NamespacedName, Protocol, family_of

SERVICE_NAME = "kubernetes.io/service-name"
TRIGGERED = "endpoints.kubernetes.io/last-change-trigger-time"
_NONE: frozenset[str] = frozenset()


class Endpoints(Struct, frozen=True):
    """A v1 Endpoints object as slices: one for each subset and family.

    Their names contain a ``~``, which no name in the API does. A service that has EndpointSlices
    does not use them (sources/controller.py).
    """

    name: NamespacedName
    slices: tuple[EndpointSlice, ...]


def endpoint_slice(raw: RawSlice) -> EndpointSlice | None:
    """Return the slice, None for one of domain names or of no service; raise FieldError."""
    metadata = raw.metadata
    name = _name(metadata)
    if raw.address_type is AddressType.FQDN:
        return None
    labels = metadata.labels or {}
    service = labels.get(SERVICE_NAME)
    if not service:
        return None  # somebody's own use of the kind; kube-proxy passes it over as well
    family = Family.IPV4 if raw.address_type is AddressType.IPV4 else Family.IPV6
    endpoints = [
        _endpoint(each, family, i) for i, each in enumerate(raw.endpoints or ()) if each.addresses
    ]
    return EndpointSlice(
        name=name,
        service=NamespacedName(
            name.namespace, checked_name(service, f'metadata.labels["{SERVICE_NAME}"]')
        ),
        family=family,
        endpoints=tuple(endpoints),
        ports=_ports(raw.ports, "ports"),
        flaws=_flaws(raw.ports, "ports"),
        headless=HEADLESS in labels,
        triggered=_triggered(metadata),
    )


def _name(metadata: Metadata) -> NamespacedName:
    return NamespacedName(
        checked_name(metadata.namespace or "default", "metadata.namespace"),
        checked_name(metadata.name, "metadata.name"),
    )


def _endpoint(raw: RawEndpoint, family: Family, index: int) -> SliceEndpoint:
    """Return an endpoint of a slice; only its first address is used, all of them are checked."""
    first: Address | None = None
    for i, text in enumerate(raw.addresses or ()):
        try:
            found = address(text)
        except ValueError as error:
            raise FieldError(f"endpoints[{index}].addresses[{i}]", str(error)) from error
        if found.version != family.value:
            why = f"{shown(text)} is not of the slice's addressType, {family}"
            raise FieldError(f"endpoints[{index}].addresses[{i}]", why)
        first = first or found
    assert first is not None  # an endpoint without addresses does not come here
    conditions, hints = raw.conditions, raw.hints
    ready, serving, terminating = True, True, False
    if conditions is not None:
        ready = conditions.ready is not False
        serving = conditions.serving is not False
        terminating = conditions.terminating is True
    return SliceEndpoint(
        address=first,
        ready=ready,
        serving=serving,
        terminating=terminating,
        node=raw.node_name or None,
        zone=raw.zone or None,
        zone_hints=frozenset([each.name for each in hints.for_zones])
        if hints is not None and hints.for_zones
        else _NONE,
        node_hints=frozenset([each.name for each in hints.for_nodes])
        if hints is not None and hints.for_nodes
        else _NONE,
        hostname=checked_label(raw.hostname, f"endpoints[{index}].hostname") or None,
        pod=_pod(raw.target_ref),
    )


def _pod(reference: Reference | None) -> str | None:
    return reference.name if reference is not None and reference.kind == "Pod" else None


def _ports(raws: list[RawPort] | None, field: str) -> tuple[SlicePort, ...]:
    """Return the ports that have a number; upstream ignores the others as well."""
    return tuple(
        [
            SlicePort(
                checked_label(raw.name, f"{field}[{i}].name"),
                raw.protocol or Protocol.TCP,
                raw.port,
            )
            for i, raw in enumerate(raws or ())
            if raw.port
        ]
    )


def _flaws(raws: list[RawPort] | None, field: str) -> tuple[Flaw, ...]:
    """Return the ports whose number is none; one without a number is legal."""
    return tuple(
        [
            Flaw(f"{field}[{i}].port", "0 is not a port number (1-65535)")
            for i, raw in enumerate(raws or ())
            if raw.port == 0
        ]
    )


def _triggered(metadata: Metadata) -> datetime | None:
    """Return the time of the change behind this slice, None if it is no time (as upstream does)."""
    text = metadata.annotations.get(TRIGGERED) if metadata.annotations else None
    if text is None:
        return None
    try:
        return msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        return None


def endpoints(raw: RawEndpoints) -> Endpoints:
    """Return v1 Endpoints as slices; a service has the same name as its Endpoints."""
    name = _name(raw.metadata)
    headless = HEADLESS in (raw.metadata.labels or {})
    slices: list[EndpointSlice] = []
    for i, subset in enumerate(raw.subsets or ()):
        field = f"subsets[{i}]"
        families: dict[Family, list[SliceEndpoint]] = {}
        for list_name, ready, addresses in (
            ("addresses", True, subset.addresses),
            ("notReadyAddresses", False, subset.not_ready_addresses),
        ):
            for j, each in enumerate(addresses or ()):
                found = _old_endpoint(each, ready, f"{field}.{list_name}[{j}]")
                families.setdefault(family_of(found.address), []).append(found)
        ports = _ports(subset.ports, f"{field}.ports")
        flaws = _flaws(subset.ports, f"{field}.ports")
        slices.extend(
            EndpointSlice(
                name=NamespacedName(name.namespace, f"{name.name}~endpoints-{i}-{family}".lower()),
                service=name,
                family=family,
                endpoints=tuple(families[family]),
                ports=ports,
                flaws=flaws,
                headless=headless,
                triggered=_triggered(raw.metadata),
            )
            for family in sorted(families)
        )
    return Endpoints(name, tuple(slices))


def _old_endpoint(raw: EndpointAddress, ready: bool, field: str) -> SliceEndpoint:
    try:
        found = address(raw.ip)
    except ValueError as error:
        raise FieldError(f"{field}.ip", str(error)) from error
    return SliceEndpoint(
        address=found,
        ready=ready,
        serving=ready,
        node=raw.node_name or None,
        hostname=checked_label(raw.hostname, f"{field}.hostname") or None,
        pod=_pod(raw.target_ref),
    )
