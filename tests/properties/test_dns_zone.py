"""Services come, change and go, and every name is answered as a list of all records would be.

The list is made straight from the specification, without any of the zone's ways to save work.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
from hypothesis import given
from hypothesis import strategies as st

from vipd.dns.answer import Answers, AnswerSettings
from vipd.dns.facts import EndpointFacts, Kind, Port, ServiceFacts
from vipd.dns.zone import Zone, ZoneSettings
from vipd.proxy.names import NamespacedName, parse_network

DOMAINS = ("cluster.local", "k8s.test")
NETWORKS = ("10.244.0.0/16", "10.96.0.0/16", "fd00:244::/64")
Records = dict[str, dict[str, set[str]]]
"""Name (with the last dot), type, data."""

services = st.builds(NamespacedName, st.just("shop"), st.sampled_from(("web", "db")))
ports: st.SearchStrategy[tuple[Port, ...]] = st.lists(
    st.tuples(
        st.sampled_from(("", "http", "sql")), st.sampled_from(("tcp", "udp")), st.integers(1, 3)
    ),
    max_size=2,
    unique_by=lambda port: port[:2],
).map(tuple)
cluster_ips = st.lists(
    st.sampled_from(("10.96.0.1", "10.111.0.2", "172.16.0.1", "fd00:244::1")),
    max_size=2,
    unique=True,
)
endpoint_ips = ("10.244.0.1", "10.244.0.2", "172.16.0.1", "fd00:244::", "fd00:244::1")


@st.composite
def groups(draw: st.DrawFn) -> EndpointFacts:
    """Return the ready endpoints of a slice; there is one at least, as facts have it."""
    addresses = draw(st.lists(st.sampled_from(endpoint_ips), min_size=1, max_size=3))
    names = st.sampled_from(("", "a", "b"))
    hostnames = [draw(names) for _ in addresses] if draw(st.booleans()) else []
    return EndpointFacts(draw(ports), tuple(map(_packed, addresses)), tuple(hostnames))


@st.composite
def facts(draw: st.DrawFn, name: NamespacedName) -> ServiceFacts:
    """Return a Service of this name."""
    kind = draw(st.sampled_from((Kind.CLUSTER, Kind.HEADLESS)))
    if kind is Kind.CLUSTER:
        ips = tuple(map(_packed, draw(cluster_ips)))
        return ServiceFacts(name.namespace, name.name, kind, ips, draw(ports))
    found = tuple(draw(st.lists(groups(), max_size=2)))
    return ServiceFacts(name.namespace, name.name, kind, endpoints=found)


changes = st.lists(services.flatmap(lambda name: facts(name) | st.just(name)), max_size=6)


@given(changes)
def test_every_name_is_answered_as_a_list_of_all_records_would_be(
    happening: list[ServiceFacts | NamespacedName],
) -> None:
    zone = Zone(ZoneSettings(domains=DOMAINS, reverse=tuple(map(parse_network, NETWORKS))))
    answers = Answers(zone, AnswerSettings())
    zone.synced = True
    present: dict[NamespacedName, ServiceFacts] = {}
    _compare(answers, dict(_all(present)))
    for change in happening:
        if isinstance(change, NamespacedName):
            assert zone.drop(change) is (present.pop(change, None) is not None)
        else:
            before = present.get(change.key)
            assert zone.put(change) is (before != change)
            present[change.key] = change
        # What this prebuilds is asked for again after the next change.
        _compare(answers, dict(_all(present)))
    for name in list(present):
        zone.drop(name)
    _compare(answers, dict(_all({})))
    assert zone.services == 0


def _compare(answers: Answers, wanted: Records) -> None:
    names = {each for name in wanted for each in _with_parents(name)}
    for name in CANDIDATES:
        for kind in ("A", "PTR") if name.endswith("arpa.") else ("A", "AAAA", "SRV"):
            answer = answers.tcp(_query(name, kind))
            if not _is_ours(name, names):
                assert not isinstance(answer, bytes), name
                continue
            assert isinstance(answer, bytes), name
            reply = _reply(answer)
            found = {str(data) for one in reply.answer for data in one}
            expected = wanted.get(name, {}).get(kind, set())
            assert found == expected, (name, kind)
            assert (reply.rcode() == dns.rcode.NOERROR) is (name in names), (name, kind)
            assert bool(reply.authority) is not bool(expected)
            # The other's decoder makes sets of records; what was sent is in the counts.
            assert int.from_bytes(answer[6:8]) == len(expected), (name, kind)
            assert int.from_bytes(answer[10:12]) == sum(map(len, reply.additional))
            assert all(one.name.to_text() == name for one in reply.answer)
            for one in reply.additional:
                there = wanted[one.name.to_text()][dns.rdatatype.to_text(one.rdtype)]
                assert {str(data) for data in one} == there


def _is_ours(name: str, names: set[str]) -> bool:
    if not name.endswith("arpa."):
        return any(name.endswith(f"{domain}.") for domain in DOMAINS)
    known = name in names and name.count(".") in (6, 34)
    return known or name.endswith(INSIDE)


def _candidates() -> Iterator[str]:
    """Yield every name that a world of these strategies can have, and some that none has.

    Below Services only those of one domain: what is different there is their own names.
    """
    labels = ["a", "b", "c", *(_dashed(each) for each in endpoint_ips), "_tcp", "_udp"]
    labels += [f"_{port}._{its}" for port in ("http", "sql") for its in ("tcp", "udp")]
    for domain in DOMAINS:
        yield f"svc.{domain}."
        for namespace in ("shop", "other"):
            yield f"{namespace}.svc.{domain}."
            for service in ("web", "db", "other"):
                own = f"{service}.{namespace}.svc.{domain}."
                yield own
                if domain == DOMAINS[0] and namespace == "shop":
                    yield from (f"{label}.{own}" for label in labels)
    for address in ("10.96.0.1", "10.111.0.2", "fd00:244::2", *endpoint_ips):
        yield _reverse(address)
    yield from ("0.244.10.in-addr.arpa.", "1.244.10.in-addr.arpa.", "244.10.in-addr.arpa.")


def _all(
    present: Mapping[NamespacedName, ServiceFacts],
) -> Iterator[tuple[str, dict[str, set[str]]]]:
    """Yield all names that have records."""
    records: Records = {}

    def add(name: str, kind: str, data: str) -> None:
        records.setdefault(name, {}).setdefault(kind, set()).add(data)

    def exists(name: str) -> None:
        records.setdefault(name, {})

    for domain in DOMAINS:
        exists(f"svc.{domain}.")
        exists(f"pod.{domain}.")
    exists("244.10.in-addr.arpa.")
    for one in present.values():
        for domain in DOMAINS:
            exists(f"{one.namespace}.svc.{domain}.")
            own = f"{one.name}.{one.namespace}.svc.{domain}."
            targets: set[tuple[str, str, int, str]] = set()
            if one.kind is Kind.CLUSTER:
                exists(own)
                for packed in one.cluster_ips:
                    add(own, *_address(packed))
                    if domain == DOMAINS[0]:
                        add(_reverse(_text(packed)), "PTR", own)
                targets = {(*port, own) for port in one.ports}
            for group in one.endpoints:
                for index, packed in enumerate(group.addresses):
                    label = group.hostnames[index] if group.hostnames else ""
                    host = f"{label or _dashed(_text(packed))}.{own}"
                    add(own, *_address(packed))
                    add(host, *_address(packed))
                    inside = any(ip_address(packed) in parse_network(each) for each in NETWORKS)
                    if domain == DOMAINS[0] and inside:
                        add(_reverse(_text(packed)), "PTR", host)
                    targets |= {(*port, host) for port in group.ports}
            _services(own, targets, add)
    yield from records.items()


def _services(
    own: str, targets: set[tuple[str, str, int, str]], add: Callable[[str, str, str], None]
) -> None:
    for _, _, number, host in targets:
        different = {(number, host) for _, _, number, host in targets}
        add(own, "SRV", f"0 {max(1, 100 // len(different))} {number} {host}")
    for port, protocol, number, host in targets:
        if port:
            same = {target for target in targets if target[:2] == (port, protocol)}
            weight = max(1, 100 // len(same))
            add(f"_{port}._{protocol}.{own}", "SRV", f"0 {weight} {number} {host}")


@lru_cache(maxsize=1 << 14)
def _reply(answer: bytes) -> dns.message.Message:
    return dns.message.from_wire(answer)


@cache
def _query(name: str, kind: str) -> bytes:
    return dns.message.make_query(name, kind).to_wire()


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


def _packed(text: str) -> bytes:
    return ip_address(text).packed


def _text(packed: bytes) -> str:
    return str(ip_address(packed))


def _address(packed: bytes) -> tuple[str, str]:
    return "A" if len(packed) == 4 else "AAAA", _text(packed)


def _reverse(address: str) -> str:
    return f"{ip_address(address).reverse_pointer}."


def _dashed(address: str) -> str:
    text = address.replace(":", "-").replace(".", "-")
    return f"{text}0" if text.endswith("-") else text


INSIDE = (".96.10.in-addr.arpa.", "244.10.in-addr.arpa.", _reverse("fd00:244::")[32:])
CANDIDATES = sorted(_candidates())
