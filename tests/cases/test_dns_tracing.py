"""The trace says of every record in the cases where it came from, and of no other record."""

from collections.abc import Iterator
from pathlib import Path

import dns.message
import dns.rcode
import dns.rdatatype
import pytest
from tests.cases.test_dns import FILES, Cluster, Settings, events, query, read

from vipd.dns.asked_name import Known
from vipd.dns.facts import PodFacts, facts_of_pod
from vipd.dns.settings import DnsSettings
from vipd.dns.tracing import Trace, trace
from vipd.proxy.events import Applied, Event
from vipd.proxy.model import Pod
from vipd.proxy.names import NamespacedName

TRACED = {dns.rdatatype.from_text(one) for one in ("A", "AAAA", "CNAME", "NS", "PTR", "SRV")}


def known(cluster: Cluster, settings: Settings, happening: list[Event]) -> Known:
    """What the daemon knows where a zone is that of a case."""
    pods: dict[NamespacedName, PodFacts] = {}
    for event in happening:
        if isinstance(event, Applied) and isinstance(event.object, Pod):
            live = facts_of_pod(event.object)
            if live is not None:
                pods[live.key] = live
    return Known(
        cluster.snapshot,
        DnsSettings(
            listen=settings.name_servers,
            domains=settings.domains,
            ttl=settings.ttl,
            negative_ttl=settings.negative_ttl,
            pods=settings.pods,
            namespaces=tuple(settings.namespaces or ()),
            reverse=settings.reverse,
        ),
        cluster.namespaces if settings.knows_namespaces else frozenset(),
        pods,
        settings.synced,
    )


def chain(traced: Trace | None) -> Iterator[Trace]:
    while traced is not None:
        yield traced
        traced = traced.tail


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_record_has_its_origin(path: Path) -> None:
    case = read(path)
    cluster = Cluster(case.settings)
    happening = events(case.manifests)
    cluster.happen(happening)
    facts = known(cluster, case.settings, happening)
    for question in case.ask:
        asked = query(question)
        name, kind = asked.question[0].name.to_text(), asked.question[0].rdtype
        found = list(chain(trace(name, kind, facts)))
        reply = cluster.answers.tcp(asked.to_wire())
        told = {one.record for each in found for one in each.origins}
        assert all(one.source for each in found for one in each.origins)
        if not isinstance(reply, bytes):
            assert not found[-1].ours, question
            continue
        message = dns.message.from_wire(reply)
        records = {
            f"{dns.rdatatype.to_text(rrset.rdtype)} {one.to_text()}"
            for rrset in message.answer
            for one in rrset
            if rrset.rdtype in TRACED
        }
        assert told == records or message.rcode(), question
        if message.rcode() == dns.rcode.NXDOMAIN:
            assert "NXDOMAIN" in found[-1].ending, question
