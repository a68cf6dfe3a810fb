"""What saves work: short ways that say what the long ones say, and nothing that piles up."""

import dns.message
import dns.rcode
import pytest
from tests.unit.dns_zone_facts import answering, own, read, web

from vipd.dns.answer import Answers
from vipd.dns.facts import EndpointFacts, Kind, ServiceFacts
from vipd.dns.names import reverse_name
from vipd.dns.zone import Zone, ZoneSettings


def ask(answers: Answers, name: str, kind: str) -> dns.message.Message:
    return read(answers.udp(dns.message.make_query(name, kind).to_wire()))


def test_of_nested_domains_the_inner_one_answers_each_time() -> None:
    zone = Zone(ZoneSettings(domains=("cluster.local", "x.svc.cluster.local")))
    zone.synced = True
    answers = Answers(zone)
    for _ in range(3):
        found = ask(answers, "dns-version.x.svc.cluster.local", "TXT")
        assert (found.rcode(), len(found.answer)) == (dns.rcode.NOERROR, 1)
        assert ask(answers, "ns.dns.x.svc.cluster.local", "A").rcode() == dns.rcode.NOERROR
        denied = ask(answers, "a.b.svc.x.svc.cluster.local", "A")
        assert denied.rcode() == dns.rcode.NXDOMAIN
        assert str(denied.authority[0].name) == "x.svc.cluster.local."


@pytest.mark.parametrize("kind", ["A", "AAAA", "SRV", "HTTPS", "SVCB", "TXT"])
def test_unknown_names_of_usual_types_take_the_short_way(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = answering(web())
    ask(answers, own("web"), "A")
    monkeypatch.setattr(answers._decisions, "decide", None)
    assert ask(answers, own("nobody"), kind).rcode() == dns.rcode.NXDOMAIN


def test_a_reply_of_two_services_is_noted_once_with_each() -> None:
    address = b"\x0a\xf4\0\1"

    def headless(name: str, port: int) -> ServiceFacts:
        group = EndpointFacts((("raft", "tcp", port),), (address,))
        return ServiceFacts("default", name, Kind.HEADLESS, endpoints=(group,))

    answers = answering(headless("one", 1), headless("two", 1))
    for port in range(2, 100):
        ask(answers, "1.0.244.10.in-addr.arpa", "PTR")
        answers.zone.put(headless("two", port))
    one = answers.zone._services[b"\3one\7default"]
    assert one.take_questions() == [reverse_name(address) + b"\0\x0c\0\1"]
