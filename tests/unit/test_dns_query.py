"""`vipd dns query`: where records come from, and why others are missing."""

import json
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import pytest
from click.testing import CliRunner, Result

from vipd.dns.origins import Origin
from vipd.dns.search_list import candidates
from vipd.dns.tracing import NO_NAME, Trace
from vipd.proxy.cli.dns_asking import Reply, is_somebody_elses, whence
from vipd.proxy.cli.dns_query import lines
from vipd.proxy.cli.main import cli

MANIFESTS = """
apiVersion: v1
kind: Namespace
metadata: {name: empty}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.20
  clusterIPs: [10.96.0.20]
  ports: [{name: http, port: 80}, {name: quic, port: 80, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, ports: [{name: sql, port: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-4, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: sql, port: 5432}]
endpoints:
- {addresses: ["10.244.1.1"], hostname: db-0, nodeName: n1, targetRef: {kind: Pod, name: db-0}}
- {addresses: ["10.244.1.2"], hostname: db-1, conditions: {ready: false}}
- {addresses: ["10.244.1.3"], conditions: {ready: false, terminating: true}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-6, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv6
ports: [{name: sql, port: 5432}]
endpoints:
- {addresses: ["fd00::1"], hostname: db-0}
---
apiVersion: v1
kind: Service
metadata: {name: idle, namespace: shop}
spec: {clusterIP: None}
---
apiVersion: v1
kind: Service
metadata: {name: alias, namespace: shop}
spec: {type: ExternalName, externalName: db.shop.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: far, namespace: shop}
spec: {type: ExternalName, externalName: www.example.com}
---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: shop}
spec: {nodeName: n1, containers: []}
status: {phase: Running, podIP: 10.244.1.9, podIPs: [{ip: 10.244.1.9}]}
"""
CONFIG = """
apiVersion: vipd/v1alpha1
kind: VipdConfiguration
dns:
  pods: verified
  forward:
    upstreams: [192.0.2.53]
    stubDomains: {corp.example: [192.0.2.54]}
    hosts: ["192.0.2.7 printer.example"]
"""
SLICE4 = "EndpointSlice shop/db-4, Pod shop/db-0 on n1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "all.yaml").write_text(MANIFESTS)
    (tmp_path / "configuration").write_text(CONFIG)
    return tmp_path


def query(folder: Path, *words: str) -> Result:
    where = ("-f", str(folder / "all.yaml"), "--config", str(folder / "configuration"))
    more = ("--cluster-cidr", "10.244.0.0/16")
    return CliRunner().invoke(cli, ["dns", "query", *words, *where, *more])


WEB, DB = "web.shop.svc.cluster.local", "db.shop.svc.cluster.local"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([WEB], ["5 A 10.96.0.20", "Service shop/web, spec.clusterIPs"]),
        (
            ["_http._tcp." + WEB, "SRV"],
            [
                f"SRV 0 100 80 {WEB}.",
                "Service shop/web, port http\n",
                f"also: {WEB}. 5 A 10.96.0.20",
            ],
        ),
        (
            [DB],
            [
                *("5 A 10.244.1.1", SLICE4),
                "missing: 10.244.1.2: not ready: EndpointSlice shop/db-4",
                "missing: 10.244.1.3: not ready, as it is terminating",
                "missing: fd00::1: is in the AAAA records",
            ],
        ),
        (["_sql._tcp." + DB, "srv"], ["5432 db-0.db.shop", f"{SLICE4}; EndpointSlice shop/db-6"]),
        (["db-0." + DB, "AAAA"], ["5 AAAA fd00::1", "EndpointSlice shop/db-6"]),
        (["10.96.0.20"], ["20.0.96.10.in-addr.arpa. PTR", "Service shop/web, spec.clusterIPs"]),
        (["10.244.1.1"], ["PTR db-0.db.shop.svc.cluster.local.", SLICE4]),
        (["10-244-1-9.shop.pod.cluster.local"], ["5 A 10.244.1.9", "Pod shop/p"]),
        (
            ["alias.shop.svc.cluster.local"],
            [
                f"CNAME {DB}.",
                "Service shop/alias, spec.externalName",
                SLICE4,
                "10.244.1.2: not ready",
            ],
        ),
        (
            ["far.shop.svc.cluster.local"],
            ["CNAME www.example.com.", "answered by: the cache, or upstream 192.0.2.53:53"],
        ),
        (["web", "-n", "shop"], [f"{WEB}. A: 1 record"]),
        (
            ["web.shop", "-n", "empty"],
            ["web.shop.empty.svc.cluster.local. A: NXDOMAIN", f"{WEB}. A: 1 record"],
        ),
    ],
    ids=lambda value: "-".join(value) if len(value) < 3 else None,
)
def test_where_records_come_from(folder: Path, words: list[str], said: list[str]) -> None:
    done = query(folder, *words, "--trace")
    assert done.exit_code == 0, done.output
    for one in said:
        assert one in done.output, done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([WEB, "AAAA"], "no cluster IP of that family: spec.clusterIPs is 10.96.0.20"),
        (["_web._tcp." + WEB, "SRV"], "shop/web has no such port; it has http/TCP, quic/UDP"),
        (["_sql._udp." + DB, "SRV"], "EndpointSlice shop/db-6 has no such port; it has sql/TCP"),
        (["db-1." + DB], "missing: 10.244.1.2: not ready"),
        (["db-2." + DB], "no endpoint is called so; there is 10-244-1-3, db-0, db-1"),
        (["10-244-1-1." + DB], "missing: 10.244.1.1: has a hostname: its name is db-0"),
        (["idle.shop.svc.cluster.local"], "no EndpointSlice of Service shop/idle has endpoints"),
        (["x." + WEB], "Service shop/web is not headless: its endpoints have no names"),
        (["x.far.shop.svc.cluster.local"], "Service shop/far is ExternalName: it has none below"),
        (["wep.shop.svc.cluster.local"], "did you mean web?"),
        (["empty.svc.cluster.local"], "the name exists, without records of this type (NODATA)"),
        (["shop.svc", "-n", "none"], "note: the name exists: musl's resolver asks no further"),
        (["web.shp.svc.cluster.local"], "there is no namespace shp"),
        (["web.empty.svc.cluster.local"], "one of that name is in: shop"),
        (["web.shop.cluster.local"], f"the label svc is missing: {WEB}"),
        (["web.shop.svc"], f"the cluster domain is missing: {WEB}"),
        (["web.shop.svc.wrong"], f"wrong is no cluster domain (domains: cluster.local): {WEB}"),
        (["web.shop"], "Pods ask by their search list"),
        (["10.244.1.2"], "the name of 10.244.1.2: not ready"),
        (["192.0.2.9"], "192.0.2.9 is no cluster IP, and in no reverse network (10.244.0.0/16)"),
        (["10-244-1-8.shop.pod.cluster.local"], "no live Pod of namespace shop has that address"),
        (["localhost"], "localhost. is a name that is never forwarded"),
        (["a.corp.example"], "upstream 192.0.2.54:53, for stub domain corp.example."),
        (["printer.example"], "records, hosts or hostsFile has this name"),
        (["printer"], "a single label is no name of others"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_why_there_is_nothing(folder: Path, words: list[str], said: str) -> None:
    done = query(folder, *words, "--trace")
    assert done.exit_code == 1, done.output
    assert said in done.output, done.output


def test_for_programs(folder: Path) -> None:
    (told,) = json.loads(query(folder, WEB, "--trace", "--json").stdout)
    assert (told["rcode"], told["authoritative"]) == ("NOERROR", True)
    assert [one["data"] for one in told["records"]] == ["10.96.0.20"]
    assert told["trace"]["origins"] == [
        {"record": "A 10.96.0.20", "source": "Service shop/web, spec.clusterIPs"}
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a..b"], "NAME"),
        (["a\\"], "NAME"),
        (["x" * 64], "NAME"),
        (["ä.example"], "NAME"),
        (["a", "NOTYPE"], "TYPE: 'NOTYPE' is no type of record"),
    ],
)
def test_what_is_no_question(folder: Path, words: list[str], said: str) -> None:
    done = query(folder, *words)
    assert done.exit_code != 0
    assert said in str(done.exception)


def test_the_search_list() -> None:
    listed = ("web.ns.svc.d.", "web.svc.d.", "web.d.")
    assert candidates("web", "ns", "d") == (*listed, "web.")
    assert candidates("a.b.c.d.e.f", "ns", "d")[0] == "a.b.c.d.e.f."
    assert candidates("web.", "ns", "d") == ("web.",)
    long = ".".join(["x" * 60] * 4)
    assert candidates(long, "namespace", "d") == (f"{long}.svc.d.", f"{long}.d.", f"{long}.")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"cache": 1.0}, "the cache"),
        ({"cache": 1.0}, {"cache": 1.0, "192.0.2.1:53": 1.0}, "upstream 192.0.2.1:53"),
        ({}, {"cache": 1.0, "192.0.2.1:53": 1.0}, ""),
        ({}, {"stale": 1.0}, "the cache, past the time to live: upstreams do not answer"),
        ({"cache": 3.0}, {"cache": 3.0}, ""),
    ],
)
def test_who_answered(before: dict[str, float], after: dict[str, float], said: str) -> None:
    assert whence(before, after) == said


@pytest.mark.parametrize(
    ("flags", "rcode", "ending", "somebody_elses"),
    [
        ("QR AA", "NOERROR", "answered from the cluster's objects", False),
        ("QR RA", "NOERROR", "answered from the cluster's objects", True),
        ("QR AA", "NXDOMAIN", "answered from the cluster's objects", True),
        ("QR AA", "NXDOMAIN", NO_NAME, False),
        ("QR AA", "NOERROR", NO_NAME, True),
        ("QR", "REFUSED", "answered from the cluster's objects", False),
        ("QR", "SERVFAIL", NO_NAME, False),
    ],
)
def test_a_reply_of_another_server(
    flags: str, rcode: str, ending: str, somebody_elses: bool
) -> None:
    message = dns.message.make_response(dns.message.make_query(WEB, "A"))
    message.flags = dns.flags.from_text(flags)
    message.set_rcode(dns.rcode.from_text(rcode))
    traced = Trace(name=f"{WEB}.", ours=True, ending=ending, origins=(Origin("A 192.0.2.1", "x"),))
    assert is_somebody_elses(message, traced) == somebody_elses
    reply = Reply(message, "way")
    reply.stranger = "192.0.2.53:53"
    assert "another server answers at 192.0.2.53:53 from here" in "\n".join(
        lines(WEB, 1, reply, traced)
    )
