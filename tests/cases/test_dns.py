"""Each file in dns/ is a cluster, questions and the replies that the DNS of vipd gives; README.md
of that folder explains the notation.

Every question is asked in several ways, and before a change as well as after: what was prebuilt
must not outlive it.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from msgspec import Struct, convert
from ryaml import loads  # type: ignore[attr-defined] # its stub forgets to say so

from vipd.dns.answer import Answers, AnswerSettings, Forward, Outcome
from vipd.dns.facts import facts_of, facts_of_pod
from vipd.dns.names import text_of
from vipd.dns.pods import PodMode
from vipd.dns.zone import Zone, ZoneSettings
from vipd.proxy.decode import decode, head_of
from vipd.proxy.decode_endpoints import Endpoints
from vipd.proxy.events import Applied, Deleted, Event, Kind
from vipd.proxy.model import Namespace, Pod
from vipd.proxy.names import NamespacedName, parse_address, parse_network
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources.documents import documents, items

FOLDER = Path(__file__).parent / "dns"
FILES = sorted(FOLDER.glob("*.yaml"))
SERIAL = 7
_LOTS = random.Random(6)


class Settings(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Settings of a case."""

    domains: tuple[str, ...] = ("cluster.local",)
    ttl: int = 5
    negative_ttl: int = 5
    pods: PodMode = "disabled"
    reverse: tuple[str, ...] = ("10.96.0.0/16", "10.244.0.0/16", "fd00:96::/64", "fd00:244::/64")
    name_servers: tuple[str, ...] = ()
    namespaces: frozenset[str] | None = None
    forwards: bool = True
    synced: bool = True
    knows_namespaces: bool = False
    """Whether Namespace objects are read; those that have a service exist in any case."""

    def zone(self) -> Zone:
        """Return an empty zone."""
        return Zone(
            ZoneSettings(
                domains=self.domains,
                ttl=self.ttl,
                negative_ttl=self.negative_ttl,
                pods=self.pods,
                reverse=tuple(map(parse_network, self.reverse)),
                name_server_addresses=tuple(map(parse_address, self.name_servers)),
                exposed=self.namespaces,
            )
        )


class Step(Struct, forbid_unknown_fields=True):
    """What happens, and what is answered after it."""

    what: str
    ask: dict[str, str]
    manifests: str = ""
    delete: list[str] = []


class Case(Struct, forbid_unknown_fields=True):
    """A file."""

    description: str
    ask: dict[str, str]
    manifests: str = ""
    settings: Settings = Settings()
    steps: list[Step] = []


class Cluster:
    """A zone, and the objects that it is told of."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.zone = settings.zone()
        self.answers = Answers(self.zone, AnswerSettings(forwards=settings.forwards))
        self.zone.synced = settings.synced
        self.zone.stamp(SERIAL)
        self.snapshot = Snapshot()
        self.namespaces: frozenset[str] = frozenset()

    def happen(self, happening: list[Event]) -> None:
        """Tell the zone what follows from events."""
        self.snapshot, touched = fold(self.snapshot, happening)
        for name in touched.services:
            service = self.snapshot.services.get(name)
            facts = facts_of(service, self.snapshot.slices.get(name, ())) if service else None
            if facts is None:
                self.zone.drop(name)
            else:
                self.zone.put(facts)
        for event in happening:
            match event:
                case Applied(Namespace() as namespace):
                    self.namespaces |= {namespace.name}
                case Deleted(Kind.NAMESPACE, name):
                    self.namespaces -= {name.name}
                case Applied(Pod() as pod):
                    live = facts_of_pod(pod)
                    if live is None:
                        self.zone.drop_pod(pod.name)
                    else:
                        self.zone.put_pod(live)
                case Deleted(Kind.POD, name):
                    self.zone.drop_pod(name)
        self.zone.namespaces(self.namespaces if self.settings.knows_namespaces else None)


def read(path: Path) -> Case:
    """Return the case of a file."""
    return convert(loads(path.read_text()), Case)


def events(manifests: str, delete: Iterable[str] = ()) -> list[Event]:
    """Return the events of the manifests; deleted objects read ``Service default/web``."""
    found: list[Event] = []
    for text in delete:
        kind, _, name = text.partition(" ")
        space, _, rest = name.rpartition("/")
        found.append(Deleted(Kind(kind), NamespacedName(space, rest)))
    for document in documents(manifests.encode()):
        for item in items(document):
            thing = decode(item.raw, "case", head_of(item.raw, "case"))
            assert not isinstance(thing, Endpoints), "cases speak of slices"
            if thing is not None:
                found.append(Applied(thing))
    return found


def query(text: str, *, edns: bool = True, spell_at_random: bool = False) -> dns.message.Message:
    """Return a query ``name type``."""
    name, _, kind = text.rpartition(" ")
    if spell_at_random:
        name = "".join(_LOTS.choice((c.upper(), c.lower())) for c in name)
    size = 4096 if edns else 0
    return dns.message.make_query(name, kind, use_edns=0 if edns else False, payload=size)


def answered(asked: dns.message.Message, answer: Outcome) -> str:
    """Return a reply in the notation of the cases; check what is the same in all."""
    if isinstance(answer, Forward):
        before = [f"{_bare(owner)} CNAME {_bare(target)}" for owner, target in answer.before]
        kind = dns.rdatatype.to_text(dns.rdatatype.RdataType(answer.type))
        return "\n".join([*before, f"forward {_bare(answer.name)} {kind}"])
    assert answer is not None
    reply = dns.message.from_wire(answer)
    assert reply.id == asked.id
    assert reply.question[0].name.to_wire() == asked.question[0].name.to_wire(), "spelling"
    assert reply.question == asked.question
    assert reply.flags & dns.flags.QR
    assert reply.flags & dns.flags.RD
    assert (reply.edns == 0) is (asked.edns == 0)
    counts = [int.from_bytes(answer[at : at + 2]) for at in (6, 10)]
    sent = [sum(map(len, section)) for section in (reply.answer, reply.additional)]
    assert counts == [sent[0], sent[1] + (asked.edns == 0)], "a record twice"
    rcode = reply.rcode()
    own = rcode in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)
    assert bool(reply.flags & dns.flags.AA) is own
    return "\n".join(_lines(reply))


def _lines(reply: dns.message.Message) -> Iterator[str]:
    why = [int(o.code) for o in reply.options if isinstance(o, dns.edns.EDEOption)]
    rcode = dns.rcode.to_text(reply.rcode())
    tail = f" ({why[0]})" if why else ""
    if reply.authority:
        (soa,) = reply.authority
        assert len(soa) == 1
        data = soa[0]
        assert soa.rdtype == dns.rdatatype.SOA
        assert data.serial == SERIAL
        assert (data.refresh, data.retry, data.expire) == (7200, 1800, 86400)
        assert data.minimum == soa.ttl or soa.ttl == 300
        tail = f" {_text(soa.name)} {soa.ttl}"
    if not reply.answer:
        yield ("NODATA" if rcode == "NOERROR" else rcode) + tail
    elif rcode != "NOERROR" or tail:
        yield rcode + tail
    yield from _records(reply.answer)
    for line in _records(reply.additional):
        yield f"also {line}"


def _records(sets: list[dns.rrset.RRset]) -> Iterator[str]:
    for one in sets:
        kind = dns.rdatatype.to_text(one.rdtype)
        for text in sorted(str(data).removesuffix(".") for data in one):
            yield f"{_text(one.name)} {one.ttl} {kind} {text}"


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True).lower()


def _bare(name: bytes) -> str:
    return text_of(name).removesuffix(".") or "."


def ask(cluster: Cluster, question: str) -> str:
    """Return what is answered, the same in every way of asking."""
    udp, tcp = cluster.answers.udp, cluster.answers.tcp
    first = query(question)
    found = answered(first, udp(first.to_wire()))
    for edns in (True, False):
        for way in (udp, udp, tcp, tcp):
            asked = query(question, edns=edns, spell_at_random=True)
            again = answered(asked, way(asked.to_wire()))
            if edns:
                assert again == found, "asked again"
            else:
                assert again == found.partition(" (")[0], "asked without EDNS"
    return found


def check(cluster: Cluster, wanted: dict[str, str], what: str) -> None:
    """Ask all questions of a step."""
    found = {question: ask(cluster, question) for question in wanted}
    assert found == {question: text.strip() for question, text in wanted.items()}, what


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_case(path: Path) -> None:
    case = read(path)
    cluster = Cluster(case.settings)
    steps = [Step("at the beginning", case.ask, case.manifests), *case.steps]
    for step in steps:
        for other in steps:
            for question in other.ask:
                ask(cluster, question)
        cluster.happen(events(step.manifests, step.delete))
        check(cluster, step.ask, step.what)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_order_in_which_objects_are_told_does_not_matter(path: Path) -> None:
    case = read(path)
    cluster = Cluster(case.settings)
    for event in reversed(events(case.manifests)):
        cluster.happen([event])
    check(cluster, case.ask, "told one by one, the last first")


def test_descriptions_are_one_sentence() -> None:
    for path in FILES:
        assert read(path).description.strip().endswith("."), path.name
        assert "\n" not in read(path).description.strip(), path.name
