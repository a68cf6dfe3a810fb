"""The cluster of `vipd bench sync`: services and slices of any number, as kubectl would print them.

Lives here: names, addresses and JSON of the generated objects. Pure.
"""

import json
from ipaddress import IPv4Address, IPv4Network
from typing import Any

SERVICE_RANGE = IPv4Network("10.96.0.0/16")
ENDPOINT_RANGE = IPv4Network("10.128.0.0/9")
PORT = 80
TARGET_PORT = 8080
_CHANGED_FROM = 60000
"""Services of changes take their addresses from here on, behind those of the cluster."""


def service_address(number: int) -> IPv4Address:
    """Return the cluster IP of a service of the cluster."""
    return SERVICE_RANGE.network_address + 1 + number


def changed_address(number: int) -> IPv4Address:
    """Return the cluster IP of a service that changes are made to."""
    return SERVICE_RANGE.network_address + _CHANGED_FROM + number


def endpoint_address(number: int) -> IPv4Address:
    """Return the address of an endpoint."""
    return ENDPOINT_RANGE.network_address + 1 + number


def cluster(services: int, endpoints: int) -> bytes:
    """Return a List of so many services with so many endpoints each, one slice a service."""
    items: list[dict[str, Any]] = []
    for number in range(services):
        first = number * endpoints
        addresses = [endpoint_address(first + step) for step in range(endpoints)]
        items += objects(f"svc-{number}", service_address(number), addresses)
    return listed(items)


def listed(items: list[dict[str, Any]]) -> bytes:
    """Return objects as one List."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}).encode()


def objects(name: str, address: IPv4Address, endpoints: list[IPv4Address]) -> list[dict[str, Any]]:
    """Return a Service and its EndpointSlice, with what an API server fills in."""
    namespace = "bench"
    service: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"00000000-0000-4000-8000-{int(address):012x}",
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": name},
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": str(address),
            "clusterIPs": [str(address)],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
            "selector": {"app": name},
            "ports": [{"name": "http", "port": PORT, "protocol": "TCP", "targetPort": TARGET_PORT}],
        },
        "status": {"loadBalancer": {}},
    }
    one_slice: dict[str, Any] = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-abcde",
            "namespace": namespace,
            "labels": {
                "kubernetes.io/service-name": name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": TARGET_PORT, "protocol": "TCP"}],
        "endpoints": [
            {
                "addresses": [str(one)],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": "node-2",
                "targetRef": {"kind": "Pod", "namespace": namespace, "name": f"{name}-{one}"},
            }
            for one in endpoints
        ],
    }
    return [service, one_slice]
