"""The zone: what a change costs and outdates, serials, settings, facts."""

from ipaddress import ip_address

import dns.message
import msgspec
import pytest
from tests.unit.dns_zone_facts import addresses, alias, answering, own, peers, read, web

from vipd.dns.answer import Answers, AnswerSettings
from vipd.dns.facts import EndpointFacts, Kind, PodFacts, ServiceFacts, facts_of, facts_of_pod
from vipd.dns.names import reverse_name, wire
from vipd.dns.prebuilt import Prebuilt, Source
from vipd.dns.records import RRset, Type
from vipd.dns.replies import Fixed, fixed, ready
from vipd.dns.zone import Zone, ZoneSettings
from vipd.proxy.model import (
    EndpointSlice,
    Pod,
    Service,
    ServicePort,
    ServiceType,
    SliceEndpoint,
    SlicePort,
)
from vipd.proxy.names import Family, NamespacedName, Protocol, parse_address, parse_network

WEB = NamespacedName("default", "web")


def ask(answers: Answers, name: str, kind: str = "A") -> dns.message.Message:
    """Return the reply over UDP."""
    return read(answers.udp(dns.message.make_query(name, kind).to_wire()))


def test_a_change_drops_the_replies_of_its_service_alone() -> None:
    answers = answering(web(), web("10.96.0.2", "other"), peers(3))
    kept = answers.zone.prebuilt
    for name in ("web", "other", "peers"):
        for kind in ("A", "AAAA", "SRV"):
            ask(answers, own(name), kind)
    ask(answers, "1.0.96.10.in-addr.arpa", "PTR")
    assert len(kept.replies) == 10
    answers.zone.put(web("10.96.0.3"))
    assert len(kept.replies) == 6
    assert not any(b"\x03web" in key for key in kept.replies)
    answers.zone.drop(NamespacedName("default", "peers"))
    assert {key[1:6] for key in kept.replies} == {b"other"}
    answers.zone.drop(NamespacedName("default", "other"))
    assert kept.replies == {}
    assert kept.bytes == 0


def test_an_address_that_gets_one_more_name_loses_its_reply() -> None:
    answers = answering(peers(2, "one"))
    assert addresses(ask(answers, "1.0.244.10.in-addr.arpa", "PTR")) == [f"10-244-0-1.{own('one')}"]
    ask(answers, "0.0.244.10.in-addr.arpa", "PTR")
    last = EndpointFacts((), (parse_address("10.244.0.1").packed,))
    answers.zone.put(ServiceFacts("default", "two", Kind.HEADLESS, endpoints=(last,)))
    assert set(answers.zone.prebuilt.replies) == {reverse_name(b"\x0a\xf4\0\0") + b"\0\x0c\0\1"}
    assert set(addresses(ask(answers, "1.0.244.10.in-addr.arpa", "PTR"))) == {
        f"10-244-0-1.{own('one')}",
        f"10-244-0-1.{own('two')}",
    }


def test_what_leads_to_others_or_is_unknown_is_not_kept() -> None:
    answers = answering(web(), alias(own("web")))
    for name, kind in (
        (own("alias"), "A"),
        (own("alias"), "CNAME"),
        (own("unknown"), "A"),
        (own("web"), "TYPE77"),
        (own("web"), "ANY"),
        ("default.svc.cluster.local", "A"),
        ("cluster.local", "SOA"),
        ("9.0.96.10.in-addr.arpa", "PTR"),
    ):
        ask(answers, name, kind)
    kept = [key for key in answers.zone.prebuilt.replies if not key.endswith(b"\0\5\0\1")]
    assert kept == []


def test_names_that_nobody_knows_take_no_memory() -> None:
    answers = answering(web())
    for index in range(1000):
        ask(answers, own(f"unknown-{index}"))
        ask(answers, f"{index % 200}.{index // 200}.96.10.in-addr.arpa", "PTR")
    assert len(answers.zone.prebuilt.replies) <= 1


def test_replies_that_are_kept_take_no_more_memory_than_they_may() -> None:
    services = [
        web(f"10.96.{index // 250}.{index % 250 + 1}", f"web-{index}") for index in range(300)
    ]
    answers = answering(*services, settings=AnswerSettings(prebuilt_bytes=20_000))
    kept = answers.zone.prebuilt
    most = 0
    for _ in range(2):
        for one in services:
            assert len(addresses(ask(answers, own(one.name)))) == 1
            most = max(most, kept.bytes)
    assert 19_000 < most <= 20_000
    assert kept.rounds > 2
    for one in services:
        answers.zone.drop(one.key)
    assert kept.replies == {}
    assert kept.bytes == 0


def test_a_reply_of_an_earlier_round_is_not_counted_twice() -> None:
    """A source remembers the questions of this round only, or its list would grow for ever."""
    kept = Prebuilt(most=1000)
    source = Source()
    replies = [fixed(1, 0, 0, bytes(200)) for _ in range(3)]
    for _ in range(10):
        for index, reply in enumerate(replies):
            kept.keep(b"%d" % index, reply, (source,))
    assert kept.rounds > 3
    assert len(source.take_questions()) <= 3
    assert source.take_questions() == []


def test_a_reply_that_is_larger_than_all_may_be_is_not_kept() -> None:
    kept = Prebuilt(most=1000)
    kept.keep(b"small", fixed(1, 0, 0, bytes(10)), ())
    kept.keep(b"large", ready(b"\1a\0", RRset(1, 5, tuple(bytes(4) for _ in range(99))), ()), ())
    assert set(kept.replies) == {b"small"}


def test_a_put_tells_whether_anything_changed() -> None:
    zone = Zone()
    assert zone.put(web())
    assert not zone.put(web())
    assert zone.put(web("10.96.0.2"))
    assert zone.put(peers(2, "web"))
    assert not zone.put(peers(2, "web"))
    assert zone.put(peers(3, "web"))
    assert zone.put(alias("example.com", "web"))
    assert not zone.put(alias("example.com", "web"))
    assert zone.put(alias("example.org", "web"))
    assert zone.services == 1
    assert zone.drop(WEB)
    assert not zone.drop(WEB)
    assert zone.services == 0


def test_a_change_of_one_endpoint_touches_one_reverse_name() -> None:
    answers = answering(peers(2000, slices=20))
    for index in range(0, 2000, 400):
        ask(answers, reverse_text(index), "PTR")
    before = dict(answers.zone._addresses._services)
    answers.zone.put(peers(1999, slices=20))
    after = answers.zone._addresses._services
    assert before.keys() - after.keys() == {(0x0AF40000 + 1999).to_bytes(4)}
    assert all(after[key] is before[key] for key in after)


def reverse_text(index: int) -> str:
    """Return the reverse name of an endpoint."""
    return ip_address(0x0AF40000 + index).reverse_pointer


@pytest.mark.parametrize(
    ("serial", "now", "then"),
    [
        (1, 1_700_000_000, 1_700_000_000),
        (1_700_000_000, 1_700_000_000, 1_700_000_000),
        (1_700_000_000, 1_699_999_999, 1_700_000_000),  # the clock went back
        (0xFFFFFFFF, 1 << 32, 0),  # RFC 1982: 0 comes after
        (5, 6 | 1 << 32, 6),
    ],
)
def test_serials(serial: int, now: int, then: int) -> None:
    zone = Zone()
    zone.serial = serial
    zone.put(web())
    zone.stamp(now)
    assert zone.serial == then
    assert serial_told(zone) == then


def serial_told(zone: Zone) -> int:
    """Return the serial in the SOA record and in a negative answer, which is the same."""
    zone.synced = True
    answers = Answers(zone)
    (soa,) = ask(answers, "cluster.local", "SOA").answer[0]
    (denial,) = ask(answers, own("unknown")).authority[0]
    assert soa == denial
    return int(soa.serial)


def test_replies_that_are_kept_tell_the_new_serial() -> None:
    answers = answering(web(), web("10.96.0.2", "other"))
    for serial in (8, 9):
        (soa,) = ask(answers, own("web"), "AAAA").authority[0]
        assert soa.serial == serial - 1
        answers.zone.put(web(f"10.96.1.{serial}", "other"))
        answers.zone.stamp(serial)


def test_names_that_are_ours_are_never_forwarded() -> None:
    zone = Zone(ZoneSettings(reverse=(parse_network("10.96.0.0/12"),)))
    for name in (
        "cluster.local",
        "a.b.c.d.e.f.cluster.local",
        "x.svc.cluster.local",
        "1.97.10.in-addr.arpa",
    ):
        assert zone.is_ours(wire(name)), name
    for name in (
        ".",
        "local",
        "xcluster.local",
        "10.in-addr.arpa",
        "1.1.1.1.in-addr.arpa",
        "ip6.arpa",
    ):
        assert not zone.is_ours(wire(name)), name
    for odd in (b"\x09x\x07cluster\x05local\0", b"\x0a10\x07in-addr\x04arpa\0"):
        assert not zone.is_ours(odd), "what looks like the end begins within a label"


def test_the_root_is_no_cluster_domain() -> None:
    with pytest.raises(ValueError, match="root"):
        Zone(ZoneSettings(domains=(".",)))


def test_a_target_longer_than_a_name_can_be_is_left_out() -> None:
    domain = ".".join(["x" * 62] * 3)
    host = EndpointFacts((("p", "tcp", 1),), (bytes(4), b"\1\1\1\1"), ("h" * 60, "h"))
    facts = ServiceFacts("n", "s", Kind.HEADLESS, endpoints=(host,))
    zone = Zone(ZoneSettings(domains=(domain,), reverse=(parse_network("0.0.0.0/0"),)))
    zone.put(facts)
    zone.synced = True
    node = zone.find(wire(f"s.n.svc.{domain}"), Type.SRV).node
    assert node.rrset is not None
    assert len(node.rrset.data) == 1
    assert zone.find(reverse_name(bytes(4)), Type.PTR).node.rrset is None
    assert zone.find(reverse_name(b"\1\1\1\1"), Type.PTR).node.rrset is not None


def test_service_records_weigh_one_at_least() -> None:
    answers = answering(peers(150))
    asked = dns.message.make_query(f"_raft._tcp.{own('peers')}", "SRV")
    assert {one.weight for one in read(answers.tcp(asked.to_wire())).answer[0]} == {1}


def test_hostnames_are_found_however_they_are_written() -> None:
    group = EndpointFacts((("raft", "tcp", 1),), (bytes((10, 244, 0, 1)),), ("Peer-0",))
    answers = answering(ServiceFacts("default", "peers", Kind.HEADLESS, endpoints=(group,)))
    assert addresses(ask(answers, f"peer-0.{own('peers')}")) == ["10.244.0.1"]
    assert addresses(ask(answers, own("peers"), "SRV")) == [f"0 100 1 peer-0.{own('peers')}"]


def test_an_external_name_that_is_no_name_leads_nowhere() -> None:
    for target in ("", "a b", f"{'x' * 64}.com", "a..b"):
        reply = ask(answering(alias(target)), own("alias"))
        assert (reply.rcode(), reply.answer) == (0, [])


def test_the_same_ports_are_the_same_object() -> None:
    """Ten thousand Services have a few different lists of ports."""
    answers = answering(web(), web("10.96.0.2", "other"))
    first, second = answers.zone._services.values()
    assert first._ports is second._ports


SLICE = EndpointSlice(
    name=NamespacedName("default", "web-1"),
    service=WEB,
    family=Family.IPV4,
    endpoints=(
        SliceEndpoint(address=parse_address("10.244.0.1"), hostname="a"),
        SliceEndpoint(address=parse_address("10.244.0.2")),
        SliceEndpoint(address=parse_address("10.244.0.3"), ready=False, hostname="c"),
    ),
    ports=(SlicePort("http", Protocol.SCTP, 8080),),
)
PORTS = (ServicePort(name="http", protocol=Protocol.UDP, port=80),)


@pytest.mark.parametrize(
    ("service", "facts"),
    [
        (
            Service(name=WEB, cluster_ips=(parse_address("10.96.0.1"),), ports=PORTS),
            ServiceFacts(
                "default", "web", cluster_ips=(b"\x0a\x60\0\1",), ports=(("http", "udp", 80),)
            ),
        ),
        (
            Service(name=WEB, headless=True, ports=PORTS),
            ServiceFacts(
                "default",
                "web",
                Kind.HEADLESS,
                endpoints=(
                    EndpointFacts(
                        (("http", "sctp", 8080),),
                        (b"\x0a\xf4\0\1", b"\x0a\xf4\0\2"),
                        ("a", ""),
                    ),
                ),
            ),
        ),
        (
            # The label alone takes a Service from kube-proxy, not its address from the DNS.
            Service(name=WEB, headless=True, cluster_ips=(parse_address("10.96.0.1"),)),
            ServiceFacts("default", "web", cluster_ips=(b"\x0a\x60\0\1",)),
        ),
        (
            Service(name=WEB, type=ServiceType.EXTERNAL_NAME, external_name="example.com"),
            ServiceFacts("default", "web", Kind.EXTERNAL, external_name="example.com"),
        ),
        (Service(name=NamespacedName("default", "a.b")), None),
        (Service(name=NamespacedName("default", "a" * 64)), None),
    ],
    ids=["cluster IP", "headless", "headless by label", "external", "two labels", "a long label"],
)
def test_facts_of_a_service(service: Service, facts: ServiceFacts | None) -> None:
    found = facts_of(service, (SLICE,))
    assert found == facts
    if found is not None:
        packed = msgspec.msgpack.encode(found)
        assert msgspec.msgpack.decode(packed, type=ServiceFacts) == found
        assert found.key == WEB


def test_slices_without_a_ready_endpoint_are_no_facts() -> None:
    unready = msgspec.structs.replace(SLICE, endpoints=SLICE.endpoints[2:])
    assert facts_of(Service(name=WEB, headless=True), (unready,)) == ServiceFacts(
        "default", "web", Kind.HEADLESS
    )


def test_facts_of_a_pod() -> None:
    pod = Pod(name=WEB, ips=(parse_address("10.244.0.1"), parse_address("fd00::1")))
    facts = facts_of_pod(pod)
    assert facts == PodFacts("default", "web", (b"\x0a\xf4\0\1", parse_address("fd00::1").packed))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(facts), type=PodFacts) == facts
    assert facts_of_pod(msgspec.structs.replace(pod, ips=())) is None
    assert facts_of_pod(msgspec.structs.replace(pod, finished=True)) is None
    assert facts_of_pod(msgspec.structs.replace(pod, terminating=True)) is None


def test_pods_are_remembered_only_where_they_are_verified() -> None:
    facts = PodFacts("default", "web", (bytes(4),))
    assert not Zone(ZoneSettings(pods="insecure")).put_pod(facts)
    zone = Zone(ZoneSettings(pods="verified"))
    assert zone.put_pod(facts)
    assert not zone.put_pod(facts)
    assert zone.drop_pod(WEB)
    assert not zone.drop_pod(WEB)


def test_namespaces_tell_whether_they_changed() -> None:
    zone = Zone(ZoneSettings(exposed=frozenset(("a", "b"))))
    assert zone.namespaces(frozenset(("a", "c")))
    assert not zone.namespaces(frozenset(("a", "d"))), "c and d are not exposed"
    assert zone.namespaces(None)
    assert not zone.namespaces(None)


def test_a_namespace_whose_name_is_too_long_for_a_label() -> None:
    zone = Zone()
    assert not zone.namespaces(frozenset(("a" * 64,)))


def test_small_replies_are_kept_as_small_objects() -> None:
    answers = answering(web())
    ask(answers, own("web"))
    (kept,) = answers.zone.prebuilt.replies.values()
    assert type(kept) is Fixed
    with pytest.raises(AttributeError):
        kept.__dict__  # noqa: B018
