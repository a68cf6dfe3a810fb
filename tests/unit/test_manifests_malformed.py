"""Every sort of malformed manifest: named by file, object, field; its neighbour still loads."""

from pathlib import Path

import pytest

from vipd.proxy.events import Applied, Problem
from vipd.proxy.names import NamespacedName
from vipd.proxy.sources.manifests import load
from vipd.proxy.sources.reading import Reading

GOOD = """
---
apiVersion: v1
kind: Service
metadata: {name: good, namespace: default}
spec: {clusterIP: 10.0.0.9, ports: [{port: 80}]}
"""


def service(spec: str, metadata: str = "name: web") -> str:
    return f"apiVersion: v1\nkind: Service\nmetadata: {{{metadata}}}\nspec: {{{spec}}}\n"


def slice_(body: str, labels: str = "kubernetes.io/service-name: web", kind: str = "IPv4") -> str:
    return (
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        f"metadata: {{name: web-1, labels: {{{labels}}}}}\naddressType: {kind}\n{body}\n"
    )


def other(kind: str, body: str, version: str = "v1") -> str:
    return f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}\n{body}\n"


def annotated(name: str, value: str) -> str:
    return service("ports: [{port: 80}]", f'name: web, annotations: {{"{name}": "{value}"}}')


PORT = "ports: [{port: 80}]"
WEB, SLICE = "Service default/web", "EndpointSlice default/web-1"
CASES = {
    "port-too-big": (service("ports: [{port: 70000}]"), WEB, "spec.ports[0].port", "65535"),
    "port-zero": (service("ports: [{port: 0}]"), WEB, "spec.ports[0].port", ">= 1"),
    "port-negative": (service("ports: [{port: -1}]"), WEB, "spec.ports[0].port", ">= 1"),
    "port-text": (service("ports: [{port: http}]"), WEB, "spec.ports[0].port", "got str"),
    "port-quoted": (service('ports: [{port: "80"}]'), WEB, "spec.ports[0].port", "got str"),
    "port-missing": (service("ports: [{name: a}]"), WEB, "spec.ports[0].port", "is missing"),
    "port-fraction": (service("ports: [{port: 80.5}]"), WEB, "spec.ports[0].port", "float"),
    "second-port": (
        service("ports: [{name: a, port: 1}, {name: b, port: x}]"),
        WEB,
        "spec.ports[1].port",
        "got str",
    ),
    "no-ports": (service("clusterIP: 10.0.0.1"), WEB, "spec.ports", "is missing"),
    "ports-object": (service("ports: {port: 80}"), WEB, "spec.ports", "expected array"),
    "node-port": (
        service("ports: [{port: 80, nodePort: 65536}]"),
        WEB,
        "spec.ports[0].nodePort",
        "65535",
    ),
    "protocol": (
        service("ports: [{port: 80, protocol: tcp}]"),
        WEB,
        "spec.ports[0].protocol",
        "TCP, UDP, SCTP",
    ),
    "port-name": (
        service('ports: [{port: 80, name: "a b"}]'),
        WEB,
        "spec.ports[0].name",
        "'a b'",
    ),
    "target-port-number": (
        service("ports: [{port: 80, targetPort: 70000}]"),
        WEB,
        "spec.ports[0].targetPort",
        "70000",
    ),
    "target-port-quoted": (
        service('ports: [{port: 80, targetPort: "8080"}]'),
        WEB,
        "spec.ports[0].targetPort",
        "without quotes",
    ),
    "duplicate-port": (
        service("ports: [{port: 80, name: a}, {port: 80, name: b}]"),
        WEB,
        "spec.ports[1].port",
        "80/TCP is already spec.ports[0]",
    ),
    "duplicate-port-name": (
        service("ports: [{port: 80}, {port: 81}]"),
        WEB,
        "spec.ports[1].name",
        "already the name of spec.ports[0]",
    ),
    "type": (service(f"type: Cluster, {PORT}"), WEB, "spec.type", "NodePort"),
    "cluster-ip": (
        service(f"clusterIP: 10.0.0.256, {PORT}"),
        WEB,
        "spec.clusterIP",
        "'10.0.0.256' is not an IP address",
    ),
    "cluster-ips": (
        service(f"clusterIPs: [10.0.0.1, fd00::g], {PORT}"),
        WEB,
        "spec.clusterIPs[1]",
        "not an IP",
    ),
    "cluster-ip-unspecified": (
        service(f"clusterIP: 0.0.0.0, {PORT}"),
        WEB,
        "spec.clusterIP",
        "unspecified",
    ),
    "cluster-ip-zone": (
        service(f"clusterIP: 'fe80::1%eth0', {PORT}"),
        WEB,
        "spec.clusterIP",
        "zone",
    ),
    "affinity": (
        service(f"sessionAffinity: Client, {PORT}"),
        WEB,
        "spec.sessionAffinity",
        "None, ClientIP",
    ),
    "affinity-timeout": (
        service(
            "sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}},"
            + PORT
        ),
        WEB,
        "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        "1-86400",
    ),
    "external-policy": (
        service(f"externalTrafficPolicy: local, {PORT}"),
        WEB,
        "spec.externalTrafficPolicy",
        "Cluster, Local",
    ),
    "internal-policy": (
        service(f"internalTrafficPolicy: 1, {PORT}"),
        WEB,
        "spec.internalTrafficPolicy",
        "got int",
    ),
    "external-name": (service("type: ExternalName"), WEB, "spec.externalName", "is missing"),
    "families": (service(f"ipFamilies: [IPv5], {PORT}"), WEB, "spec.ipFamilies[0]", "IPv5"),
    "selector": (service(f"selector: {{app: 1}}, {PORT}"), WEB, "spec.selector", "got int"),
    "ip-mode": (
        service(PORT) + "status: {loadBalancer: {ingress: [{ip: 1.2.3.4, ipMode: vip}]}}\n",
        WEB,
        "status.loadBalancer.ingress[0].ipMode",
        "VIP, Proxy",
    ),
    "created": (
        service(PORT, "name: web, creationTimestamp: yesterday"),
        WEB,
        "metadata.creationTimestamp",
        "RFC3339",
    ),
    "name-missing": (service(PORT, "labels: {}"), "Service", "metadata.name", "is missing"),
    "name-number": (service(PORT, "name: 5"), "Service", "metadata.name", "got int"),
    "name-slash": (service(PORT, "name: a/b"), "Service", "metadata.name", "'a/b'"),
    "namespace": (
        service(PORT, "name: web, namespace: 'a b'"),
        "Service",
        "metadata.namespace",
        "'a b'",
    ),
    "no-spec": ("apiVersion: v1\nkind: Service\nmetadata: {name: web}\n", WEB, "spec", "missing"),
    "no-metadata": ("apiVersion: v1\nkind: Service\n", "Service", "metadata", "is missing"),
    "no-kind": ("apiVersion: v1\nmetadata: {name: web}\n", "default/web", "kind", "is missing"),
    "no-version": ("kind: Service\nmetadata: {name: web}\n", WEB, "apiVersion", "is missing"),
    "annotation-unknown": (
        annotated("vipd/weight", "a=1"),
        WEB,
        'metadata.annotations["vipd/weight"]',
        "vipd/weights",
    ),
    "annotation-algorithm": (
        annotated("vipd/algorithm", "rr"),
        WEB,
        'metadata.annotations["vipd/algorithm"]',
        "round-robin",
    ),
    "annotation-weights-zero": (
        annotated("vipd/weights", "10.0.0.1=0"),
        WEB,
        'metadata.annotations["vipd/weights"]',
        "not 1-100",
    ),
    "annotation-weights-grammar": (
        annotated("vipd/weights", "10.0.0.1:3"),
        WEB,
        'metadata.annotations["vipd/weights"]',
        "endpoint=weight",
    ),
    "annotation-weights-twice": (
        annotated("vipd/weights", "a=3, a=2"),
        WEB,
        'metadata.annotations["vipd/weights"]',
        "twice",
    ),
    "annotation-weights-address": (
        annotated("vipd/weights", "10.0.0.300=3"),
        WEB,
        'metadata.annotations["vipd/weights"]',
        "neither",
    ),
    "annotation-scheduler": (
        annotated("vipd/ipvs-scheduler", "fastest"),
        WEB,
        'metadata.annotations["vipd/ipvs-scheduler"]',
        "'fastest' is not one of rr, wrr, lc, wlc, lblc, lblcr, sh, mh, dh, sed, nq, fo, ovf",
    ),
    "annotation-drain-negative": (
        annotated("vipd/drain-seconds", "-1"),
        WEB,
        'metadata.annotations["vipd/drain-seconds"]',
        "'-1' is not a number of seconds, 0-86400",
    ),
    "annotation-drain-long": (
        annotated("vipd/drain-seconds", "86401"),
        WEB,
        'metadata.annotations["vipd/drain-seconds"]',
        "0-86400",
    ),
    "annotation-drain-unit": (
        annotated("vipd/drain-seconds", "5m"),
        WEB,
        'metadata.annotations["vipd/drain-seconds"]',
        "0-86400",
    ),
    "annotation-proxy-protocol": (
        annotated("vipd/proxy-protocol", "v1"),
        WEB,
        'metadata.annotations["vipd/proxy-protocol"]',
        "'v1' is not v2",
    ),
    "annotation-keep-failing": (
        annotated("vipd/keep-failing-endpoints", "yes"),
        WEB,
        'metadata.annotations["vipd/keep-failing-endpoints"]',
        "'yes' is not one of true, false",
    ),
    "slice-type": (slice_("endpoints: []", kind="IPv5"), SLICE, "addressType", "FQDN"),
    "slice-address": (
        slice_("endpoints: [{addresses: [10.0.0.1]}, {addresses: [x]}]"),
        SLICE,
        "endpoints[1].addresses[0]",
        "'x' is not an IP address",
    ),
    "slice-family": (
        slice_("endpoints: [{addresses: ['fd00::1']}]"),
        SLICE,
        "endpoints[0].addresses[0]",
        "addressType, IPv4",
    ),
    "slice-port": (slice_("ports: [{port: 65536}]"), SLICE, "ports[0].port", "65535"),
    "slice-condition": (
        slice_("endpoints: [{addresses: [10.0.0.1], conditions: {ready: maybe}}]"),
        SLICE,
        "endpoints[0].conditions.ready",
        "expected bool",
    ),
    "slice-hint": (
        slice_("endpoints: [{addresses: [10.0.0.1], hints: {forZones: [{}]}}]"),
        SLICE,
        "endpoints[0].hints.forZones[0].name",
        "is missing",
    ),
    "endpoints-ip": (
        other("Endpoints", "subsets: [{addresses: [{ip: 127.0.0.1}]}]"),
        "Endpoints default/x",
        "subsets[0].addresses[0].ip",
        "loopback",
    ),
    "pod-ip": (
        other("Pod", "status: {podIPs: [{ip: 10.0.0}]}"),
        "Pod default/x",
        "status.podIPs[0].ip",
        "not an IP",
    ),
    "pod-port": (
        other("Pod", "spec: {containers: [{ports: [{name: a, containerPort: 0}]}]}"),
        "Pod default/x",
        "spec.containers[0].ports[0].containerPort",
        ">= 1",
    ),
    "node-cidr": (
        other("Node", "spec: {podCIDRs: [ten]}"),
        "Node x",
        "spec.podCIDRs[0]",
        "not a CIDR",
    ),
    "node-address": (
        other("Node", "status: {addresses: [{type: InternalIP, address: node}]}"),
        "Node x",
        "status.addresses[0].address",
        "not an IP",
    ),
    "service-cidr": (
        other("ServiceCIDR", "spec: {cidrs: [10.0.0.0/8, '']}", "networking.k8s.io/v1"),
        "ServiceCIDR x",
        "spec.cidrs[1]",
        "not a CIDR",
    ),
    "scalar": ("hello\n", "", "", "is not an object"),
    "sequence": ("- a\n- b\n", "", "", "is not an object"),
    "syntax": ("a: [1, 2\n", "", "", "not YAML"),
    "tab": ("a:\n\tb: 1\n", "", "", "not YAML"),
    "twice-the-same-key": ("kind: Service\nkind: Service\n", "", "", "duplicate"),
    "unknown-alias": ("a: *b\n", "", "", "unknown anchor"),
    "deep": ("a: " + "[" * 2000 + "\n", "", "", "nested too deeply"),
    "bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n"
            for i in range(8)
        ),
        "",
        "",
        "repetition limit",
    ),
    "control-character": ("\n\na: \x00b\n", "", "", "control characters are not allowed at line 3"),
    "object-as-key": ("? {a: b}\n: c\n", "", "", "the document that begins at line 1"),
    "key-twice": ("a: 1\na: 2\n", "", "", "the document that begins at line 1"),
    "kind-typo": (
        "apiVersion: v1\nkind: Servcie\nmetadata: {name: web}\n",
        "Servcie default/web",
        "kind",
        "'Servcie' is no kind of v1; is Service of v1 meant?",
    ),
    "kind-of-another-version": (
        "apiVersion: v1\nkind: EndpointSlice\nmetadata: {name: web-1}\n",
        "EndpointSlice default/web-1",
        "kind",
        "is EndpointSlice of discovery.k8s.io/v1 meant?",
    ),
    "old-version": (
        "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: web-1}\n",
        "EndpointSlice default/web-1",
        "apiVersion",
        "'discovery.k8s.io/v1beta1': EndpointSlice is read of discovery.k8s.io/v1 only",
    ),
    "version-typo": (
        "apiVersion: V1\nkind: Service\nmetadata: {name: web}\n",
        "Service default/web",
        "apiVersion",
        "'V1': Service is read of v1 only",
    ),
    "list-in-list": (
        "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: List, items: []}]\n",
        "List",
        "",
        "within a list",
    ),
    "items": ("apiVersion: v1\nkind: List\nitems: 5\n", "", "", "items is not an array"),
}


@pytest.mark.parametrize(("text", "thing", "field", "why"), CASES.values(), ids=list(CASES))
def test_names_file_object_and_field(
    tmp_path: Path, text: str, thing: str, field: str, why: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text + GOOD)
    events = load([str(tmp_path)])
    (problem,) = [each for each in events if isinstance(each, Problem)]
    error = problem.error
    assert error is not None
    assert error.origin.startswith(str(path))
    assert "document 1" in error.origin
    assert (error.thing, error.field) == (thing, field)
    assert why in error.why
    assert all(part in str(error) for part in (str(path), thing, field, why))
    applied = [each.object.name for each in events if isinstance(each, Applied)]
    assert applied == [NamespacedName("default", "good")]


@pytest.mark.parametrize(
    "text",
    [
        slice_("endpoints: []", labels=""),
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n",
        "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: x}\n",
        "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: x}\n",
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n",
        "apiVersion: metrics.k8s.io/v1beta1\nkind: NodeMetrics\nmetadata: {name: x}\n",
    ],
)
def test_what_is_no_concern_of_ours_is_no_problem(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.yaml").write_text(text + GOOD)
    events = load([str(tmp_path)])
    assert not [each for each in events if isinstance(each, Problem)]
    applied = [each.object.name for each in events if isinstance(each, Applied)]
    assert applied == [NamespacedName("default", "good")]


FLAWS = {
    "external-ip": (
        "spec.externalIPs[1]",
        "externalIPs: [1.2.3.4, 1.2.3, '', 127.0.0.1]",
        "'1.2.3' is not an IP address; spec.externalIPs[3]: '127.0.0.1' is an unspecified",
    ),
    "source-range": (
        "spec.loadBalancerSourceRanges[0]",
        "loadBalancerSourceRanges: [10.0.0.0/33, 10.0.0.0/8]",
        "'10.0.0.0/33' is not a CIDR",
    ),
    "source-range-without-prefix": (
        "spec.loadBalancerSourceRanges[0]",
        "loadBalancerSourceRanges: [10.0.0.0]",
        "'10.0.0.0' is not a CIDR",
    ),
    "many": (
        "spec.externalIPs[0]",
        f"externalIPs: [{', '.join('abcdefgh')}]",
        "spec.externalIPs[4]: 'e' is not an IP address; and 3 more (left out",
    ),
}


@pytest.mark.parametrize(("field", "spec", "why"), FLAWS.values(), ids=list(FLAWS))
def test_a_wrong_entry_is_named_and_the_rest_of_the_service_is_served(
    tmp_path: Path, field: str, spec: str, why: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(service(f"{spec}, {PORT}") + GOOD)
    reading = Reading([str(path)])
    events = reading.refresh(0.0)
    (problem,) = [each for each in events if isinstance(each, Problem)]
    error = problem.error
    assert error is not None
    assert (error.origin, error.thing) == (f"{path} document 1", "Service default/web")
    assert error.field == field
    assert why in error.why
    assert error.why.endswith("(left out; the rest is served)")
    applied = [each.object.name for each in events if isinstance(each, Applied)]
    assert applied == [NamespacedName("default", one) for one in ("web", "good")]
    path.write_text(f"{path.read_text()}# more\n")  # known by its digest, and not decoded again
    assert reading.refresh(1.0) == []
    path.write_text(service(PORT) + GOOD)
    assert [one for one in reading.refresh(2.0) if isinstance(one, Problem)] == [
        Problem(problem.key, None)
    ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"apiVersion": "v1", "kind": ', "truncated"),
        (b'{"apiVersion": "v1"} nonsense', "trailing"),
        (b"[1]", "is not an object"),
        (b"\xff\xfe{}", "malformed"),
        (b'{"kind": "\xff"}', "utf-8"),
        (b'{"a":' * 100_000, "recursion"),
    ],
)
def test_json_file_that_is_none(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    (tmp_path / "good.yaml").write_text(GOOD)
    events = load([str(tmp_path)])
    (problem,) = [each for each in events if isinstance(each, Problem)]
    assert problem.key == str(tmp_path / "bad.json")
    assert problem.error is not None
    assert why in str(problem.error).lower()
    assert len([each for each in events if isinstance(each, Applied)]) == 1


def test_item_of_a_list_is_named_by_its_place(tmp_path: Path) -> None:
    items = ", ".join(
        f"{{metadata: {{name: s{i}}}, spec: {{ports: [{{port: {port}}}]}}}}"
        for i, port in enumerate((80, 0, 81))
    )
    (tmp_path / "a.yaml").write_text(f"apiVersion: v1\nkind: ServiceList\nitems: [{items}]\n")
    events = load([str(tmp_path / "a.yaml")])
    (problem,) = [each for each in events if isinstance(each, Problem)]
    assert str(problem.error).startswith(
        f"{tmp_path}/a.yaml items[1]: Service default/s1: spec.ports[0].port: "
    )
    names = [each.object.name for each in events if isinstance(each, Applied)]
    assert names == [NamespacedName("default", "s0"), NamespacedName("default", "s2")]


def test_line_of_a_syntax_error_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD + "---\na: 1\n\tb: 2\n")
    (problem,) = [e for e in load([str(tmp_path)]) if isinstance(e, Problem)]
    assert "line 9" in str(problem.error)
