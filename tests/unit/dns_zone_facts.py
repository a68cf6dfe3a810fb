"""Facts for tests of the zone and of answers, and what they are asked with."""

from ipaddress import ip_address

import dns.message
import dns.rcode

from vipd.dns.answer import Answers, AnswerSettings
from vipd.dns.facts import EndpointFacts, Kind, ServiceFacts
from vipd.dns.zone import Zone, ZoneSettings
from vipd.proxy.names import parse_network

REVERSE = tuple(map(parse_network, ("10.96.0.0/16", "10.244.0.0/16")))


def web(address: str = "10.96.0.1", name: str = "web") -> ServiceFacts:
    """Return a Service with a cluster IP and a port."""
    ports = (("http", "tcp", 80),)
    return ServiceFacts("default", name, cluster_ips=(ip_address(address).packed,), ports=ports)


def peers(number: int, name: str = "peers", slices: int = 1) -> ServiceFacts:
    """Return a headless Service with so many endpoints from 10.244.0.0 on, port 2380."""
    addresses = [(0x0AF40000 + index).to_bytes(4) for index in range(number)]
    share = -(-number // slices)
    groups = tuple(
        EndpointFacts((("raft", "tcp", 2380),), tuple(addresses[at : at + share]))
        for at in range(0, number, share)
    )
    return ServiceFacts("default", name, Kind.HEADLESS, endpoints=groups)


def alias(target: str, name: str = "alias") -> ServiceFacts:
    """Return a Service that is another name."""
    return ServiceFacts("default", name, Kind.EXTERNAL, external_name=target)


def answering(*services: ServiceFacts, settings: AnswerSettings | None = None) -> Answers:
    """Return answers from a zone with these Services."""
    zone = Zone(ZoneSettings(reverse=REVERSE))
    for one in services:
        zone.put(one)
    zone.synced = True
    zone.stamp(7)
    return Answers(zone, settings)


def own(name: str) -> str:
    """Return the name of a Service in namespace default."""
    return f"{name}.default.svc.cluster.local."


def read(answer: object) -> dns.message.Message:
    """Return a reply."""
    assert isinstance(answer, bytes)
    return dns.message.from_wire(answer)


def addresses(reply: dns.message.Message) -> list[str]:
    """Return the data of the answers, in order."""
    return [str(data) for one in reply.answer for data in one]
