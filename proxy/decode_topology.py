"""Pods, Nodes, Namespaces and ServiceCIDRs of the API become objects of the model.

Lives here: what of a Pod its endpoints depend on, which addresses a Node has. Must not: know how
JSON is read, or which Service selects a Pod (sources/controller.py).
Source: core/v1 and networking.k8s.io/v1, v1.37; ready as in pkg/api/v1/pod.IsPodReady.
"""

from vipd.proxy.decode_fields import FieldError, address, checked_label, checked_name, network
from vipd.proxy.decode_raw import (
    PodStatus,
    RawNamespace,
    RawNode,
    RawPod,
    RawServiceCIDR,
)
from vipd.proxy.model import ContainerPort, Namespace, Node, Pod, ServiceCIDR
from vipd.proxy.names import Address, NamespacedName, Protocol

ZONE = "topology.kubernetes.io/zone"
TO_BE_DELETED = "ToBeDeletedByClusterAutoscaler"
"""Taint that the cluster autoscaler sets, with any value and effect, before it deletes a node."""
_FINISHED = ("Succeeded", "Failed")


def pod(raw: RawPod) -> Pod:
    """Return the Pod, or raise FieldError."""
    metadata, spec, status = raw.metadata, raw.spec, raw.status
    name = NamespacedName(
        checked_name(metadata.namespace or "default", "metadata.namespace"),
        checked_name(metadata.name, "metadata.name"),
    )
    return Pod(
        name=name,
        labels=tuple(sorted((metadata.labels or {}).items())),
        ips=_pod_ips(status) if status else (),
        node=(spec.node_name or None) if spec else None,
        ready=status is not None
        and any(each.type == "Ready" and each.status == "True" for each in status.conditions or ()),
        terminating=metadata.deletion_timestamp is not None,
        finished=status is not None and status.phase in _FINISHED,
        ports=_container_ports(raw),
        hostname=checked_label(spec.hostname, "spec.hostname") if spec else "",
        subdomain=checked_label(spec.subdomain, "spec.subdomain") if spec else "",
        service_links=spec is None or spec.enable_service_links is not False,
    )


def _pod_ips(status: PodStatus) -> tuple[Address, ...]:
    texts = [(each.ip, f"status.podIPs[{i}].ip") for i, each in enumerate(status.pod_ips or ())]
    found: list[Address] = []
    for text, field in texts or [(status.pod_ip, "status.podIP")]:
        if text:
            try:
                found.append(address(text))
            except ValueError as error:
                raise FieldError(field, str(error)) from error
    return tuple(found)


def _container_ports(raw: RawPod) -> tuple[ContainerPort, ...]:
    """Return the named ports, those of restartable init containers (sidecars) after the others."""
    if raw.spec is None:
        return ()
    containers = [(f"spec.containers[{i}]", c) for i, c in enumerate(raw.spec.containers or ())]
    containers += [
        (f"spec.initContainers[{i}]", c)
        for i, c in enumerate(raw.spec.init_containers or ())
        if c.restart_policy == "Always"
    ]
    return tuple(
        ContainerPort(
            checked_label(port.name, f"{field}.ports[{j}].name"),
            port.protocol or Protocol.TCP,
            port.container_port,
        )
        for field, container in containers
        for j, port in enumerate(container.ports or ())
        if port.name
    )


def node(raw: RawNode) -> Node:
    """Return the Node with InternalIPs before ExternalIPs, or raise FieldError."""
    found: dict[str, list[Address]] = {"InternalIP": [], "ExternalIP": []}
    for i, each in enumerate((raw.status.addresses if raw.status else None) or ()):
        if each.type in found:
            try:
                found[each.type].append(address(each.address))
            except ValueError as error:
                raise FieldError(f"status.addresses[{i}].address", str(error)) from error
    spec = raw.spec
    cidrs = (
        [(text, f"spec.podCIDRs[{i}]") for i, text in enumerate(spec.pod_cidrs or ())]
        if spec
        else []
    )
    if spec and not cidrs and spec.pod_cidr:
        cidrs = [(spec.pod_cidr, "spec.podCIDR")]
    return Node(
        name=checked_name(raw.metadata.name, "metadata.name"),
        addresses=tuple(found["InternalIP"] + found["ExternalIP"]),
        pod_cidrs=tuple(network(text, field) for text, field in cidrs),
        zone=(raw.metadata.labels or {}).get(ZONE) or None,
        leaving=_leaving(raw),
    )


def _leaving(raw: RawNode) -> str:
    if raw.metadata.deletion_timestamp is not None:
        return "it is being deleted"
    taints = (raw.spec.taints if raw.spec else None) or ()
    return f"taint {TO_BE_DELETED}" if any(one.key == TO_BE_DELETED for one in taints) else ""


def namespace(raw: RawNamespace) -> Namespace:
    """Return the Namespace, or raise FieldError."""
    return Namespace(checked_name(raw.metadata.name, "metadata.name"))


def service_cidr(raw: RawServiceCIDR) -> ServiceCIDR:
    """Return the ServiceCIDR, or raise FieldError."""
    return ServiceCIDR(
        checked_name(raw.metadata.name, "metadata.name"),
        tuple(network(text, f"spec.cidrs[{i}]") for i, text in enumerate(raw.spec.cidrs)),
    )
