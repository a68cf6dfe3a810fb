"""A Service of the API becomes a Service of the model.

Lives here: what one field of a Service says about another. Must not: know how JSON is read.
Source: reference kube-proxy.md 2.1; API validation of core/v1 Service, v1.37.
"""

from vipd.proxy.annotations import NOTHING, asked
from vipd.proxy.decode_fields import (
    FieldError,
    address,
    checked_label,
    checked_name,
    is_label,
    network,
    shown,
)
from vipd.proxy.decode_raw import (
    AddressType,
    Affinity,
    IPMode,
    RawService,
    RawServicePort,
    ServiceSpec,
)
from vipd.proxy.model import (
    Flaw,
    Service,
    ServicePort,
    ServiceType,
    TrafficDistribution,
    TrafficPolicy,
)
from vipd.proxy.names import Address, Family, NamespacedName, Network, Protocol

PROXY_NAME = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"
DEFAULT_AFFINITY_SECONDS = 10800
MAX_AFFINITY_SECONDS = 86400
_DISTRIBUTIONS = {
    "PreferClose": TrafficDistribution.SAME_ZONE,
    "PreferSameZone": TrafficDistribution.SAME_ZONE,
    "PreferSameNode": TrafficDistribution.SAME_NODE,
}
"""Others mean nothing to the controllers, and are no error."""


def service(raw: RawService) -> Service:
    """Return the Service, or raise FieldError.

    A wrong external or load-balancer address, or source range, is left out, and is one of `flaws`.
    """
    flaws: list[Flaw] = []
    metadata, spec = raw.metadata, raw.spec
    name = NamespacedName(
        checked_name(metadata.namespace or "default", "metadata.namespace"),
        checked_name(metadata.name, "metadata.name"),
    )
    labels = metadata.labels or {}
    wanted = asked(metadata.annotations) if metadata.annotations else NOTHING
    kind = spec.type or ServiceType.CLUSTER_IP
    cluster_ips, none = _cluster_ips(spec)
    return Service(
        name=name,
        created=metadata.creation_timestamp,
        type=kind,
        headless=none or HEADLESS in labels,
        proxy_name=labels.get(PROXY_NAME),
        cluster_ips=cluster_ips,
        families=_families(spec),
        external_ips=_external_ips(spec, flaws),
        load_balancer_ips=_load_balancer_ips(raw, flaws),
        ports=_ports(spec, kind, none),
        internal_policy=spec.internal_traffic_policy or TrafficPolicy.CLUSTER,
        external_policy=spec.external_traffic_policy or TrafficPolicy.CLUSTER,
        affinity_seconds=_affinity_seconds(spec),
        source_ranges=(ranges := _source_ranges(spec, flaws)),
        ranges_lost=len(ranges) < len(spec.load_balancer_source_ranges or ()),
        health_check_node_port=spec.health_check_node_port or 0,
        publish_not_ready=spec.publish_not_ready_addresses or False,
        distribution=_DISTRIBUTIONS.get(
            spec.traffic_distribution or "", TrafficDistribution.ANYWHERE
        ),
        selector=tuple(sorted(spec.selector.items())) if spec.selector else (),
        external_name=_external_name(spec, kind),
        algorithm=wanted.algorithm,
        weights=wanted.weights,
        scheduler=wanted.scheduler,
        drain_seconds=wanted.drain_seconds,
        proxy_protocol=wanted.proxy_protocol,
        keeps_failing=wanted.keeps_failing,
        flaws=tuple(flaws),
    )


def _cluster_ips(spec: ServiceSpec) -> tuple[tuple[Address, ...], bool]:
    """Return the cluster IPs and whether the Service says that it wants none (headless)."""
    texts, field = spec.cluster_ips, "spec.clusterIPs"
    if not texts:
        texts, field = [spec.cluster_ip] if spec.cluster_ip else [], "spec.clusterIP"
    if texts == ["None"]:
        return (), True
    return _addresses([text for text in texts if text], field), False


def _families(spec: ServiceSpec) -> tuple[Family, ...]:
    families: list[Family] = []
    for i, each in enumerate(spec.ip_families or ()):
        if each is AddressType.FQDN:
            raise FieldError(f"spec.ipFamilies[{i}]", "'FQDN' is not one of IPv4, IPv6")
        families.append(Family.IPV4 if each is AddressType.IPV4 else Family.IPV6)
    return tuple(families)


def _addresses(texts: list[str] | None, field: str) -> tuple[Address, ...]:
    if not texts:
        return ()
    found: list[Address] = []
    for i, text in enumerate(texts):
        try:
            found.append(address(text))
        except ValueError as error:
            where = field if field == "spec.clusterIP" else f"{field}[{i}]"
            raise FieldError(where, str(error)) from error
    return tuple(found)


def _external_ips(spec: ServiceSpec, flaws: list[Flaw]) -> tuple[Address, ...]:
    """Return the addresses; blank ones are passed over in silence, as kube-proxy does."""
    found: list[Address] = []
    for i, text in enumerate(spec.external_ips or ()):
        if not text.strip():
            continue
        try:
            found.append(address(text))
        except ValueError as error:
            flaws.append(Flaw(f"spec.externalIPs[{i}]", str(error)))
    return tuple(found)


def _source_ranges(spec: ServiceSpec, flaws: list[Flaw]) -> tuple[Network, ...]:
    found: list[Network] = []
    for i, text in enumerate(spec.load_balancer_source_ranges or ()):
        try:
            found.append(network(text, f"spec.loadBalancerSourceRanges[{i}]"))
        except FieldError as error:
            flaws.append(Flaw(error.field, error.why))
    return tuple(found)


def _load_balancer_ips(raw: RawService, flaws: list[Flaw]) -> tuple[Address, ...]:
    """Return the addresses that are captured; a load balancer in mode Proxy is left alone."""
    if raw.status is None or raw.status.load_balancer is None:
        return ()
    found: list[Address] = []
    for i, each in enumerate(raw.status.load_balancer.ingress or ()):
        if not each.ip or each.ip_mode is IPMode.PROXY:
            continue
        try:
            found.append(address(each.ip))
        except ValueError as error:
            flaws.append(Flaw(f"status.loadBalancer.ingress[{i}].ip", str(error)))
    return tuple(found)


def _ports(spec: ServiceSpec, kind: ServiceType, headless: bool) -> tuple[ServicePort, ...]:
    if not spec.ports:
        if not headless and kind is not ServiceType.EXTERNAL_NAME:
            raise FieldError("spec.ports", "is missing")
        return ()
    if len(spec.ports) == 1:
        return (_port(spec.ports[0], "spec.ports[0]"),)
    found: list[ServicePort] = []
    numbers: dict[tuple[int, Protocol], int] = {}
    names: dict[tuple[str, Protocol], int] = {}
    for i, raw in enumerate(spec.ports):
        port = _port(raw, f"spec.ports[{i}]")
        first = numbers.setdefault((port.port, port.protocol), i)
        if first != i:
            why = f"{port.port}/{port.protocol} is already spec.ports[{first}]"
            raise FieldError(f"spec.ports[{i}].port", why)
        first = names.setdefault((port.name, port.protocol), i)
        if first != i:
            why = f"{shown(port.name)} is already the name of spec.ports[{first}]"
            raise FieldError(f"spec.ports[{i}].name", why)
        found.append(port)
    return tuple(found)


def _port(raw: RawServicePort, field: str) -> ServicePort:
    target = raw.target_port
    if target is None or target in (0, ""):
        target = raw.port
    elif isinstance(target, int):
        if not 1 <= target <= 65535:
            raise FieldError(f"{field}.targetPort", f"{target} is not a port number (1-65535)")
    elif target.isascii() and target.isdigit():
        raise FieldError(f"{field}.targetPort", f"{shown(target)} is text; write it without quotes")
    elif not is_label(target):
        raise FieldError(f"{field}.targetPort", f"{shown(target)} is not a port's name")
    return ServicePort(
        name=checked_label(raw.name, f"{field}.name"),
        protocol=raw.protocol or Protocol.TCP,
        port=raw.port,
        node_port=raw.node_port or 0,
        target_port=target,
    )


def _affinity_seconds(spec: ServiceSpec) -> int | None:
    if spec.session_affinity is not Affinity.CLIENT_IP:
        return None
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    if seconds is None:
        return DEFAULT_AFFINITY_SECONDS
    if not 1 <= seconds <= MAX_AFFINITY_SECONDS:
        field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        raise FieldError(field, f"{seconds} is not within 1-{MAX_AFFINITY_SECONDS}")
    return seconds


def _external_name(spec: ServiceSpec, kind: ServiceType) -> str:
    if kind is not ServiceType.EXTERNAL_NAME:
        return ""
    name = (spec.external_name or "").removesuffix(".")
    return checked_name(name, "spec.externalName")
