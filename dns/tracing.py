"""Why a name is answered as it is: `vipd dns query --trace`, from the objects themselves.

Lives here: which object decides a name, and what is the matter where there is no such name. Pure.
Must not: decide what is answered: the zone is asked, with the one Service in it that matters.
"""

from collections.abc import Iterator

from msgspec import Struct

from vipd.dns.asked_name import AskedName, Known
from vipd.dns.hints import of_no_name, of_others
from vipd.dns.lookup import Ending, Found
from vipd.dns.names import text_of, wire
from vipd.dns.origins import Missing, Origin, is_headless, missing, of_service, texts
from vipd.dns.others import who_answers
from vipd.dns.records import Type
from vipd.dns.search_list import candidates

MOST_CNAMES = 10
NO_NAME = "no such name (NXDOMAIN)"
"""The ending of a name that does not exist."""


class Trace(Struct, frozen=True, kw_only=True):
    """How one name came to its answer."""

    name: str
    """With its last dot, in lower case."""
    ours: bool
    """Whether the cluster's zone answers for it; others are asked of upstreams."""
    ending: str
    """What there is at the name, in words."""
    origins: tuple[Origin, ...] = ()
    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()
    others: str = ""
    """Who answers where the cluster does not, in words; empty: not known."""
    tail: "Trace | None" = None
    """Of the name that a CNAME leads to."""


class Asked(Struct, frozen=True, kw_only=True):
    """What `vipd dns query --trace` asks the daemon."""

    name: str
    type: int
    namespace: str = ""
    """That of the pod whose search list counts; empty: the name is asked as it is."""


class Course(Struct, frozen=True):
    """The names that are asked one after the other."""

    traces: tuple[Trace, ...]


def course(asked: Asked, known: Known) -> Course:
    """Return what becomes of a question, as a pod would ask it. Raise ValueError for no name."""
    names: tuple[str, ...] = (asked.name,)
    if asked.namespace:
        wire(asked.name)
        names = candidates(asked.name, asked.namespace, known.settings.domains[0])
    return Course(tuple([trace(one, asked.type, known) for one in names]))


def trace(name: str, kind: int, known: Known) -> Trace:
    """Return how a name comes to its answer for a type of record.

    Costs O(services) where there is no such name or it is a reverse one. Raise ValueError for what
    is no name.
    """
    return _trace(wire(name.lower()), kind, known, MOST_CNAMES)


def _trace(key: bytes, kind: int, known: Known, left: int) -> Trace:
    name = AskedName(key, known)
    zone = name.zone()
    found = zone.find(key, kind)
    if found.ending is Ending.NOT_OURS:
        notes = tuple(of_others(name))
        configured = known.configured
        others = who_answers(key, kind, known.settings, configured) if configured else ""
        ending = "not the cluster's"
        return Trace(name=text_of(key), ours=False, ending=ending, notes=notes, others=others)
    rrset = found.node.rrset
    made = Trace(
        name=text_of(key),
        ours=True,
        ending=_ending(found, kind),
        origins=tuple(_origins(name, found)),
        missing=tuple(_missing(name, found, kind)),
        notes=tuple(of_no_name(name)) if found.ending is Ending.NO_NAME else (),
    )
    if rrset is None or rrset.type != Type.CNAME or kind in (Type.CNAME, Type.ANY):
        return made
    if not left:
        return Trace(name=made.name, ours=True, ending="CNAMEs lead to CNAMEs: SERVFAIL")
    tail = _trace(rrset.data[0].lower(), kind, known, left - 1)
    return Trace(name=made.name, ours=True, ending=made.ending, origins=made.origins, tail=tail)


def _ending(found: Found, kind: int) -> str:
    match found.ending:
        case Ending.NO_NAME:
            return NO_NAME
        case Ending.NOT_READY:
            return "not known yet: not all objects have been read (SERVFAIL)"
        case _:
            rrset = found.node.rrset
            if rrset is None and kind != Type.ANY:
                return "the name exists, without records of this type (NODATA)"
            if rrset is not None and rrset.type == Type.CNAME != kind:
                return "another name stands for it (CNAME)"
            return "answered from the cluster's objects"


def _origins(name: AskedName, found: Found) -> Iterator[Origin]:
    rrset = found.node.rrset
    if rrset is None:
        return
    slices = name.known.snapshot.slices
    if name.service is not None:
        asked = name.below[0][1:] if name.below and rrset.type == Type.SRV else b""
        there = slices.get(name.service.name, ())
        yield from of_service(name.service, there, rrset, asked.decode("latin-1").upper())
    elif name.address is not None:
        for text, data in texts(rrset):
            yield Origin(text, _of_reverse(name, text_of(data)))
    elif name.kind == "pod":
        for text, data in texts(rrset):
            pods = [
                f"Pod {one.key}" for one in (name.known.pods or {}).values()
                if one.namespace == name.namespace and data in one.addresses
            ]  # fmt: skip
            yield Origin(
                text, ", ".join(sorted(pods)) or "made of the name itself (pods: insecure)"
            )
    else:
        for text, _ in texts(rrset):
            yield Origin(text, "the DNS server itself (setting listen)")


def _of_reverse(name: AskedName, target: str) -> str:
    """Return what gave an address the name that a PTR record holds."""
    for service in name.of_address():
        owner = f"{service.name.name}.{service.name.namespace}.svc."
        if target.startswith(owner):
            return f"Service {service.name}, spec.clusterIPs"
        if is_headless(service) and target.partition(".")[2].startswith(owner):
            there = [one for one in name.behind(service) if one.endpoint.address == name.address]
            return "; ".join(dict.fromkeys(map(str, there)))
    return "nothing that is known now"


def _missing(name: AskedName, found: Found, kind: int) -> Iterator[Missing]:
    if found.ending is Ending.NOT_READY:
        return
    if name.service is not None:
        slices = name.known.snapshot.slices.get(name.service.name, ())
        yield from missing(name.service, slices, name.below, kind)
    elif name.address is not None and found.node.rrset is None:
        for service in name.of_address():
            for one in name.behind(service):
                if one.endpoint.address != name.address:
                    continue
                if not is_headless(service):
                    why = f"Service {service.name} is not headless: its endpoints have no names"
                elif not one.endpoint.ready:
                    why = f"not ready: {one}"
                else:
                    why = f"it is in none of the reverse networks: {one}"
                yield Missing(f"the name of {name.address}", why)
