"""The Kubernetes API's JSON, only the fields that are read, and what msgspec says about the rest.

Lives here: one Struct for each API object, spelled as the API spells it; ranges that hold whatever
else an object says; the translation of a decoding error to a field path. Must not: check one field
against another, or know the model (decode.py). Any field may be null where Go may omit it.
Source: core/v1, discovery.k8s.io/v1 and networking.k8s.io/v1 of the Kubernetes API, v1.37.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct, field
from msgspec.json import Decoder

from vipd.proxy.decode_fields import FieldError
from vipd.proxy.model import ServiceType, TrafficPolicy
from vipd.proxy.names import Protocol

PortNumber = Annotated[int, Meta(ge=1, le=65535)]
OptionalPortNumber = Annotated[int, Meta(ge=0, le=65535)]
"""A port number; 0 says that there is none."""


class Affinity(StrEnum):
    """``spec.sessionAffinity`` of a Service."""

    NONE = "None"
    CLIENT_IP = "ClientIP"


class AddressType(StrEnum):
    """``addressType`` of an EndpointSlice, and ``spec.ipFamilies`` (where FQDN does not occur)."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"
    FQDN = "FQDN"


class IPMode(StrEnum):
    """``ipMode`` of an address of a load balancer."""

    VIP = "VIP"
    PROXY = "Proxy"


class Raw(Struct, rename="camel", gc=False):
    """Ancestor of all: lower camel case, unknown fields dropped."""


class Metadata(Raw):
    """``metadata`` of any object."""

    name: str | None = None
    namespace: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None


class RawServicePort(Raw):
    """An entry of ``spec.ports`` of a Service."""

    port: PortNumber
    name: str | None = None
    protocol: Protocol | None = None
    node_port: OptionalPortNumber | None = None
    target_port: int | str | None = None


class ClientIP(Raw):
    """``spec.sessionAffinityConfig.clientIP``."""

    timeout_seconds: int | None = None


class AffinityConfig(Raw):
    """``spec.sessionAffinityConfig``."""

    client_ip: ClientIP | None = field(default=None, name="clientIP")


class ServiceSpec(Raw):
    """``spec`` of a Service."""

    type: ServiceType | None = None
    ports: list[RawServicePort] | None = None
    selector: dict[str, str] | None = None
    cluster_ip: str | None = field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = field(default=None, name="clusterIPs")
    external_ips: list[str] | None = field(default=None, name="externalIPs")
    ip_families: list[AddressType] | None = None
    session_affinity: Affinity | None = None
    session_affinity_config: AffinityConfig | None = None
    internal_traffic_policy: TrafficPolicy | None = None
    external_traffic_policy: TrafficPolicy | None = None
    load_balancer_source_ranges: list[str] | None = None
    health_check_node_port: OptionalPortNumber | None = None
    publish_not_ready_addresses: bool | None = None
    traffic_distribution: str | None = None
    external_name: str | None = None


class Ingress(Raw):
    """An entry of ``status.loadBalancer.ingress``."""

    ip: str | None = None
    ip_mode: IPMode | None = None


class LoadBalancer(Raw):
    """``status.loadBalancer``."""

    ingress: list[Ingress] | None = None


class ServiceStatus(Raw):
    """``status`` of a Service."""

    load_balancer: LoadBalancer | None = None


class RawService(Raw):
    """v1 Service."""

    metadata: Metadata
    spec: ServiceSpec
    status: ServiceStatus | None = None


class Conditions(Raw):
    """``endpoints[].conditions``; absent means the default, which differs from one to the other."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Named(Raw):
    """``hints.forZones[]`` and ``hints.forNodes[]``."""

    name: str


class Hints(Raw):
    """``endpoints[].hints``."""

    for_zones: list[Named] | None = None
    for_nodes: list[Named] | None = None


class Reference(Raw):
    """``targetRef`` of an endpoint."""

    kind: str | None = None
    name: str | None = None


class RawEndpoint(Raw):
    """An entry of ``endpoints`` of an EndpointSlice."""

    addresses: list[str] | None = None
    conditions: Conditions | None = None
    hostname: str | None = None
    node_name: str | None = None
    zone: str | None = None
    target_ref: Reference | None = None
    hints: Hints | None = None


class RawPort(Raw):
    """A port of an EndpointSlice or of an Endpoints subset."""

    name: str | None = None
    port: OptionalPortNumber | None = None
    protocol: Protocol | None = None


class RawSlice(Raw):
    """discovery.k8s.io/v1 EndpointSlice."""

    metadata: Metadata
    address_type: AddressType
    endpoints: list[RawEndpoint] | None = None
    ports: list[RawPort] | None = None


class EndpointAddress(Raw):
    """An address in a subset of Endpoints."""

    ip: str
    hostname: str | None = None
    node_name: str | None = None
    target_ref: Reference | None = None


class Subset(Raw):
    """An entry of ``subsets`` of Endpoints."""

    addresses: list[EndpointAddress] | None = None
    not_ready_addresses: list[EndpointAddress] | None = None
    ports: list[RawPort] | None = None


class RawEndpoints(Raw):
    """v1 Endpoints."""

    metadata: Metadata
    subsets: list[Subset] | None = None


class RawContainerPort(Raw):
    """``spec.containers[].ports[]``."""

    container_port: PortNumber
    name: str | None = None
    protocol: Protocol | None = None


class Container(Raw):
    """``spec.containers[]`` and ``spec.initContainers[]``."""

    ports: list[RawContainerPort] | None = None
    restart_policy: str | None = None


class PodSpec(Raw):
    """``spec`` of a Pod."""

    node_name: str | None = None
    hostname: str | None = None
    subdomain: str | None = None
    enable_service_links: bool | None = None
    containers: list[Container] | None = None
    init_containers: list[Container] | None = None


class PodCondition(Raw):
    """``status.conditions[]``."""

    type: str
    status: str


class PodIP(Raw):
    """``status.podIPs[]``."""

    ip: str | None = None


class PodStatus(Raw):
    """``status`` of a Pod."""

    phase: str | None = None
    pod_ip: str | None = field(default=None, name="podIP")
    pod_ips: list[PodIP] | None = field(default=None, name="podIPs")
    conditions: list[PodCondition] | None = None


class RawPod(Raw):
    """v1 Pod."""

    metadata: Metadata
    spec: PodSpec | None = None
    status: PodStatus | None = None


class Taint(Raw):
    """An entry of ``spec.taints`` of a Node."""

    key: str | None = None


class NodeSpec(Raw):
    """``spec`` of a Node."""

    pod_cidr: str | None = field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = field(default=None, name="podCIDRs")
    taints: list[Taint] | None = None


class NodeAddress(Raw):
    """``status.addresses[]``."""

    type: str
    address: str


class NodeStatus(Raw):
    """``status`` of a Node."""

    addresses: list[NodeAddress] | None = None


class RawNode(Raw):
    """v1 Node."""

    metadata: Metadata
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class RawNamespace(Raw):
    """v1 Namespace."""

    metadata: Metadata


class ServiceCIDRSpec(Raw):
    """``spec`` of a ServiceCIDR."""

    cidrs: list[str]


class RawServiceCIDR(Raw):
    """networking.k8s.io/v1 ServiceCIDR."""

    metadata: Metadata
    spec: ServiceCIDRSpec


T = TypeVar("T")
_WHERE = re.compile(r" - at `\$\.?(?P<path>[^`]*)`\Z")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]+)`")
_ENUMERATIONS: Mapping[str, type[Enum]] = MappingProxyType(
    {
        "protocol": Protocol,
        "type": ServiceType,
        "addressType": AddressType,
        "sessionAffinity": Affinity,
        "internalTrafficPolicy": TrafficPolicy,
        "externalTrafficPolicy": TrafficPolicy,
        "ipMode": IPMode,
    }
)


def decode_raw(decoder: Decoder[T], raw: bytes | msgspec.Raw) -> T:
    """Return what the decoder makes of `raw`; FieldError whatever the bytes are."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from error
    except msgspec.DecodeError as error:
        raise FieldError("", _lower(str(error))) from error
    except UnicodeDecodeError as error:
        raise FieldError("", "is not UTF-8") from error
    except RecursionError as error:
        raise FieldError("", "is nested too deeply") from error


def _field_error(message: str) -> FieldError:
    """Turn ``Expected `int`, got `str` - at `$.spec.ports[0].port``` into path and sentence."""
    path = ""
    if where := _WHERE.search(message):
        path = where["path"].replace("[...]", "")
        message = message[: where.start()]
    if missing := _MISSING.fullmatch(message):
        return FieldError(f"{path}.{missing['name']}".lstrip("."), "is missing")
    last = path.rpartition(".")[2]
    if message.startswith("Invalid enum value") and last in _ENUMERATIONS:
        allowed = ", ".join(str(each.value) for each in _ENUMERATIONS[last])
        message = f"{message}; there are {allowed}"
    return FieldError(path, _lower(message))


def _lower(message: str) -> str:
    message = message.replace("`", "")
    return message if message.startswith("JSON") else message[:1].lower() + message[1:]
