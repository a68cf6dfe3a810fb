"""Objects of the API become objects of the model; any bytes end in a value or an error."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vipd.proxy.decode import decode, decode_kind, flaws, head_of
from vipd.proxy.decode_endpoints import Endpoints
from vipd.proxy.errors import ManifestError
from vipd.proxy.events import Kind
from vipd.proxy.left_out import _without_port
from vipd.proxy.model import (
    Algorithm,
    ContainerPort,
    EndpointSlice,
    Namespace,
    Node,
    Pod,
    Service,
    ServiceCIDR,
    ServicePort,
    ServiceType,
    SliceEndpoint,
    SlicePort,
    TrafficPolicy,
)
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName
from vipd.proxy.virtualserver import Key, VirtualServer
from vipd.proxy.virtualserver import Kind as ServerKind

WEB = NamespacedName("default", "web")
VERSIONS = {
    "EndpointSlice": "discovery.k8s.io/v1",
    "ServiceCIDR": "networking.k8s.io/v1",
}


def made(kind: str, metadata: Mapping[str, object] | None = None, **fields: object) -> bytes:
    version = VERSIONS.get(kind, "v1")
    whole = {"kind": kind, "apiVersion": version, "metadata": {"name": "web", **(metadata or {})}}
    return json.dumps(whole | fields).encode()


def service(metadata: Mapping[str, object] | None = None, **spec: object) -> Service:
    found = decode(made("Service", metadata, spec={"ports": [{"port": 80}]} | spec), "x")
    assert isinstance(found, Service)
    return found


def slice_(**fields: object) -> EndpointSlice | None:
    metadata: dict[str, object] = {"labels": {"kubernetes.io/service-name": "web"}}
    found = decode(made("EndpointSlice", metadata, **({"addressType": "IPv4"} | fields)), "x")
    assert found is None or isinstance(found, EndpointSlice)
    return found


def test_a_whole_service() -> None:
    raw = made(
        "Service",
        {
            "namespace": "shop",
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "labels": {"service.kubernetes.io/service-proxy-name": ""},
            "annotations": {
                "vipd/algorithm": "maglev",
                "vipd/weights": "010.0.0.1=3, pod-a = 2",
                "vipd/ipvs-scheduler": " wlc",
                "vipd/drain-seconds": "86400 ",
                "vipd/proxy-protocol": " v2",
                "vipd/keep-failing-endpoints": "true ",
            },
        },
        spec={
            "type": "LoadBalancer",
            "clusterIP": "10.0.0.1",
            "clusterIPs": ["10.0.0.2", "fd00::2"],
            "ipFamilies": ["IPv4", "IPv6"],
            "externalIPs": ["192.0.2.1"],
            "ports": [
                {
                    "name": "a",
                    "port": 53,
                    "protocol": "UDP",
                    "nodePort": 30053,
                    "targetPort": "dns",
                },
                {"name": "b", "port": 53},
            ],
            "selector": {"z": "1", "a": "2"},
            "internalTrafficPolicy": "Local",
            "externalTrafficPolicy": "Local",
            "sessionAffinity": "ClientIP",
            "loadBalancerSourceRanges": [" 10.1.2.3/8 ", "fd00::/8"],
            "healthCheckNodePort": 31000,
            "publishNotReadyAddresses": True,
            "allocateLoadBalancerNodePorts": False,
        },
        status={
            "loadBalancer": {
                "ingress": [
                    {"ip": "203.0.113.1"},
                    {"ip": "203.0.113.2", "ipMode": "Proxy"},
                    {"ip": "203.0.113.3", "ipMode": "VIP"},
                    {"hostname": "lb.example.com"},
                ]
            }
        },
    )
    assert decode(raw, "x") == Service(
        name=NamespacedName("shop", "web"),
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        type=ServiceType.LOAD_BALANCER,
        proxy_name="",
        cluster_ips=(ip_address("10.0.0.2"), ip_address("fd00::2")),
        families=(Family.IPV4, Family.IPV6),
        external_ips=(ip_address("192.0.2.1"),),
        load_balancer_ips=(ip_address("203.0.113.1"), ip_address("203.0.113.3")),
        ports=(
            ServicePort(
                name="a", protocol=Protocol.UDP, port=53, node_port=30053, target_port="dns"
            ),
            ServicePort(name="b", protocol=Protocol.TCP, port=53, target_port=53),
        ),
        internal_policy=TrafficPolicy.LOCAL,
        external_policy=TrafficPolicy.LOCAL,
        affinity_seconds=10800,
        source_ranges=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
        health_check_node_port=31000,
        publish_not_ready=True,
        selector=(("a", "2"), ("z", "1")),
        algorithm=Algorithm.MAGLEV,
        weights=(("10.0.0.1", 3), ("pod-a", 2)),
        scheduler="wlc",
        drain_seconds=86400,
        proxy_protocol=True,
        keeps_failing=True,
    )
    assert decode_kind(Kind.SERVICE, raw, "x") == decode(raw, "x")


@pytest.mark.parametrize(
    ("spec", "ips", "headless"),
    [
        ({"clusterIP": "None"}, (), True),
        ({"clusterIP": "None", "clusterIPs": ["None"]}, (), True),
        ({"clusterIP": ""}, (), False),
        ({"clusterIPs": None}, (), False),
        ({}, (), False),
        ({"clusterIP": "010.001.0.1"}, ("10.1.0.1",), False),
        ({"clusterIP": "::ffff:10.0.0.1"}, ("10.0.0.1",), False),
    ],
)
def test_cluster_ips(spec: dict[str, Any], ips: tuple[str, ...], headless: bool) -> None:
    found = service(**spec)
    assert found.cluster_ips == tuple(map(ip_address, ips))
    assert found.headless is headless


def test_nulls_are_defaults() -> None:
    assert service(type=None, externalIPs=None, selector=None, sessionAffinity=None) == service()


def test_a_wrong_entry_is_left_out_and_the_rest_is_kept() -> None:
    raw = made(
        "Service",
        spec={
            "ports": [{"port": 80}],
            "externalIPs": [
                "192.0.2.1",
                "nonsense",
                "",
                " ",
                "0.0.0.0",
                "255.255.255.255",
                "0.1.2.3",
                "239.255.255.255",
                "240.0.0.1",
            ],
            "loadBalancerSourceRanges": ["10.0.0.0/8", "fd00::/129"],
        },
        status={"loadBalancer": {"ingress": [{"ip": "x"}, {"ip": "203.0.113.1"}, {"ip": "::"}]}},
    )
    found = decode(raw, "x")
    assert isinstance(found, Service)
    assert found.external_ips == (ip_address("192.0.2.1"), ip_address("240.0.0.1"))
    assert found.load_balancer_ips == (ip_address("203.0.113.1"),)
    assert (found.source_ranges, found.ranges_lost) == ((ip_network("10.0.0.0/8"),), True)
    assert sorted(one.field for one in found.flaws) == [
        "spec.externalIPs[1]",
        "spec.externalIPs[4]",
        "spec.externalIPs[5]",
        "spec.externalIPs[6]",
        "spec.externalIPs[7]",
        "spec.loadBalancerSourceRanges[1]",
        "status.loadBalancer.ingress[0].ip",
        "status.loadBalancer.ingress[2].ip",
    ]
    assert not service(loadBalancerSourceRanges=["10.0.0.0/8"]).ranges_lost


def test_external_name_needs_no_ports() -> None:
    found = service(type="ExternalName", ports=None, externalName="db.example.com.")
    assert (found.external_name, found.ports) == ("db.example.com", ())


def test_a_port_without_a_sensible_number_is_named_and_the_rest_of_the_slice_holds() -> None:
    endpoints = [{"addresses": ["10.0.0.1"]}]
    ports = [{"name": "a", "port": 0}, {"name": "b", "port": 8080}, {"name": "c"}]
    found = slice_(endpoints=endpoints, ports=ports)
    assert found is not None
    assert [one.name for one in found.ports] == ["b"]
    assert len(found.endpoints) == 1
    told = flaws(found, "x.yaml", "EndpointSlice default/web-1")
    assert str(told) == (
        "x.yaml: EndpointSlice default/web-1: ports[0].port: 0 is not a port number (1-65535) "
        "(left out; the rest is served)"
    )
    subsets = [{"addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "ports": ports}]
    old = flaws(decode(made("Endpoints", subsets=subsets), "x"), "x", "Endpoints default/web")
    assert str(old).count("subsets[0].ports[0].port: 0 is not") == 1


def test_conditions_and_ports_of_a_slice() -> None:
    found = slice_(
        endpoints=[
            {"addresses": ["010.0.0.1", "10.0.0.2"]},
            {"addresses": []},
            {
                "addresses": ["10.0.0.3"],
                "conditions": {"ready": False, "serving": None, "terminating": True},
                "nodeName": "n",
                "zone": "z",
                "hostname": "h",
                "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "n"}]},
                "targetRef": {"kind": "Pod", "name": "p"},
            },
        ],
        ports=[{"port": 8080}, {"port": 0}, {"name": "b", "port": None}],
    )
    assert found is not None
    assert found.endpoints == (
        SliceEndpoint(address=ip_address("10.0.0.1")),
        SliceEndpoint(
            address=ip_address("10.0.0.3"),
            ready=False,
            serving=True,
            terminating=True,
            node="n",
            zone="z",
            hostname="h",
            zone_hints=frozenset({"z"}),
            node_hints=frozenset({"n"}),
            pod="p",
        ),
    )
    assert found.ports == (SlicePort("", Protocol.TCP, 8080),)
    assert (found.service, found.family) == (WEB, Family.IPV4)


def test_slices_of_domain_names_are_not_kept() -> None:
    assert slice_(addressType="FQDN", endpoints=[{"addresses": ["a.example"]}]) is None


def test_trigger_time_that_is_none_is_no_error() -> None:
    for text, time in (("soon", None), ("2026-01-02T00:00:00.5Z", 500000)):
        metadata = {
            "labels": {"kubernetes.io/service-name": "web"},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": text},
        }
        found = decode(made("EndpointSlice", metadata, addressType="IPv6"), "x")
        assert isinstance(found, EndpointSlice)
        assert (found.triggered and found.triggered.microsecond) == time


def test_endpoints_are_one_slice_for_each_subset_and_family() -> None:
    found = decode(
        made(
            "Endpoints",
            subsets=[
                {
                    "addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
                    "notReadyAddresses": [{"ip": "10.0.0.2"}],
                    "ports": [{"port": 80}],
                },
                {"addresses": [{"ip": "10.0.0.3"}]},
            ],
        ),
        "x",
    )
    assert isinstance(found, Endpoints)
    assert [
        (s.name.name, [(str(e.address), e.ready) for e in s.endpoints]) for s in found.slices
    ] == [
        ("web~endpoints-0-ipv4", [("10.0.0.1", True), ("10.0.0.2", False)]),
        ("web~endpoints-0-ipv6", [("fd00::1", True)]),
        ("web~endpoints-1-ipv4", [("10.0.0.3", True)]),
    ]
    assert found.slices[0].service == WEB


def test_pod() -> None:
    raw = made(
        "Pod",
        {"labels": {"b": "1", "a": "2"}, "deletionTimestamp": "2026-01-02T03:04:05Z"},
        spec={
            "nodeName": "n",
            "containers": [
                {"ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 1}]}
            ],
            "initContainers": [
                {"restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 9}]},
                {"ports": [{"name": "once", "containerPort": 7}]},
            ],
        },
        status={
            "phase": "Failed",
            "podIP": "10.0.0.1",
            "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    )
    assert decode(raw, "x") == Pod(
        name=WEB,
        labels=(("a", "2"), ("b", "1")),
        ips=(ip_address("10.0.0.1"), ip_address("fd00::1")),
        node="n",
        ready=True,
        terminating=True,
        finished=True,
        ports=(ContainerPort("http", Protocol.TCP, 8080), ContainerPort("side", Protocol.TCP, 9)),
    )


def test_cluster_wide_objects() -> None:
    addresses = [
        {"type": "ExternalIP", "address": "192.0.2.1"},
        {"type": "Hostname", "address": "web"},
        {"type": "InternalIP", "address": "10.0.0.1"},
    ]
    metadata: dict[str, object] = {"labels": {"topology.kubernetes.io/zone": "z"}}
    raw = made("Node", metadata, spec={"podCIDR": "10.1.0.0/24"}, status={"addresses": addresses})
    assert decode(raw, "x") == Node(
        name="web",
        addresses=(ip_address("10.0.0.1"), ip_address("192.0.2.1")),
        pod_cidrs=(ip_network("10.1.0.0/24"),),
        zone="z",
    )
    assert decode(made("Namespace"), "x") == Namespace("web")
    assert decode(made("ServiceCIDR", spec={"cidrs": ["10.0.0.0/8"]}), "x") == ServiceCIDR(
        "web", (ip_network("10.0.0.0/8"),)
    )


def test_other_kinds_are_passed_over_and_named() -> None:
    raw = b'{"kind": "Service", "apiVersion": "serving.knative.dev/v1", "metadata": {"name": "a"}}'
    assert decode(raw, "x") is None
    head = head_of(raw, "x")
    assert (head.read, str(head)) == (False, "Service default/a")


def test_error_of_a_watch_names_the_object() -> None:
    raw = b'{"metadata": {"name": "web", "namespace": "shop"}, "spec": {"ports": [{"port": 0}]}}'
    with pytest.raises(ManifestError) as caught:
        decode_kind(Kind.SERVICE, raw, "watch")
    assert str(caught.value) == ("watch: Service shop/web: spec.ports[0].port: expected int >= 1")


CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "spec",
        "status",
        "metadata",
        "ports",
        "endpoints",
        "subsets",
        "addresses",
        "addressType",
        "clusterIPs",
    ]
)
KINDS = st.sampled_from([*(kind.value for kind in Kind), "Endpoints"])


def value_or_manifest_error(raw: bytes) -> None:
    try:
        decode(raw, "x")
    except ManifestError as error:
        assert error.origin == "x"  # noqa: PT017 - both ends are right
    for kind in Kind:
        try:
            decode_kind(kind, raw, "x")
        except ManifestError as error:
            assert error.why  # noqa: PT017


@CALM
@given(st.binary())
def test_any_bytes(raw: bytes) -> None:
    value_or_manifest_error(raw)


@CALM
@given(KINDS, st.dictionaries(FIELDS, JSON))
def test_any_json(kind: str, fields: dict[str, object]) -> None:
    whole = {"kind": kind, "apiVersion": VERSIONS.get(kind, "v1")} | fields
    value_or_manifest_error(json.dumps(whole).encode())


@CALM
@given(st.text(), KINDS)
def test_any_text_where_text_belongs(text: str, kind: str) -> None:
    metadata: dict[str, object] = {
        "namespace": text,
        "labels": {"kubernetes.io/service-name": text},
        "annotations": dict.fromkeys(
            (
                "vipd/weights",
                "vipd/algorithm",
                "vipd/ipvs-scheduler",
                "vipd/drain-seconds",
                "vipd/proxy-protocol",
                "vipd/keep-failing-endpoints",
            ),
            text,
        ),
    }
    value_or_manifest_error(
        made(
            kind,
            metadata,
            addressType="IPv4",
            endpoints=[{"addresses": [text]}],
            subsets=[{"addresses": [{"ip": text}]}],
            spec={
                "clusterIP": text,
                "externalIPs": [text],
                "ports": [{"port": 1, "targetPort": text}],
                "cidrs": [text],
            },
            status={"podIP": text, "addresses": [{"type": "InternalIP", "address": text}]},
        )
    )


@pytest.mark.parametrize(
    "raw", [b'{"a":' * 100_000, b"[" * 100_000, b'{"kind":"Pod","x":' + b"[" * 99999]
)
def test_deep_nesting(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        decode(raw, "x")
    with pytest.raises(ManifestError):
        decode_kind(Kind.POD, raw, "x")


def test_too_large() -> None:
    with pytest.raises(ManifestError, match="larger than 16 MiB"):
        decode(b" " * (17 << 20), "x")


def test_explain_names_the_port_that_was_left_out() -> None:
    found = slice_(
        endpoints=[{"addresses": ["10.0.0.1"]}],
        ports=[{"name": "a", "port": 0}, {"name": "b", "port": 8080}],
    )
    assert found is not None
    server = VirtualServer(
        key=Key(Family.IPV4, ip_address("10.96.0.1"), Protocol.TCP, 80),
        owner=ServicePortName(WEB, "a", Protocol.TCP),
        kind=ServerKind.CLUSTER,
        cluster=(),
        local=(),
    )
    (told,) = _without_port([found], server)
    assert told.why.endswith("(it has b/TCP; ports[0].port: 0 is not a port number (1-65535))")
