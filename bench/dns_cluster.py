"""The cluster of `vipd bench dns`: manifests for vipd, the same names as records for others. Pure.

Lives here: names, and what stands at them by the specification. Must not: know the forms in which
servers want it (dns_configurations.py).
"""

from ipaddress import IPv4Address
from typing import NamedTuple

from vipd.bench import sync_cluster
from vipd.bench.dns_plan import DOMAIN

NAMESPACE = "bench"
ENDPOINTS = 5
SUFFIX = f"{NAMESPACE}.svc.{DOMAIN}"
TTL = 5


class Record(NamedTuple):
    """One record, without a dot at the end of names."""

    owner: str
    type: str
    data: str


class Cluster(NamedTuple):
    """The same twice."""

    manifests: bytes
    records: tuple[Record, ...]


def services(count: int) -> Cluster:
    """Return so many services with a cluster IP, five endpoints and one named port each."""
    records: list[Record] = []
    for number in range(count):
        owner = name_of(number)
        records.append(Record(owner, "A", str(sync_cluster.service_address(number))))
        target = f"0 100 {sync_cluster.PORT} {owner}"
        records.append(Record(f"_http._tcp.{owner}", "SRV", target))
    return Cluster(sync_cluster.cluster(count, ENDPOINTS), tuple(records))


def headless(endpoints: int) -> Cluster:
    """Return one headless service with so many endpoints, each of which has a name of its own."""
    found = [sync_cluster.endpoint_address(number) for number in range(endpoints)]
    owner = f"peers.{SUFFIX}"
    records = [Record(owner, "A", str(one)) for one in found]
    records += [Record(f"peer-{n}.{owner}", "A", str(one)) for n, one in enumerate(found)]
    return Cluster(sync_cluster.listed(headless_objects("peers", found)), tuple(records))


def headless_objects(name: str, endpoints: list[IPv4Address]) -> list[dict[str, object]]:
    """Return a headless Service and its slice; endpoint n has the hostname peer-n."""
    meta = {"name": name, "namespace": NAMESPACE}
    ports = [{"name": "http", "port": sync_cluster.PORT, "protocol": "TCP"}]
    service: dict[str, object] = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {"clusterIP": "None", "clusterIPs": ["None"], "ports": ports},
    }
    one_slice: dict[str, object] = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            **meta,
            "name": f"{name}-abcde",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": [
            {"addresses": [str(one)], "hostname": f"peer-{n}", "conditions": {"ready": True}}
            for n, one in enumerate(endpoints)
        ],
    }
    return [service, one_slice]


def name_of(number: int) -> str:
    """Return the name of a service of `services`."""
    return f"svc-{number}.{SUFFIX}"
