"""Who is asked by `vipd dns query`: a server over the network, or the zone made of manifests.

Lives here: questions and replies. Must not: print (dns_query.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype
import msgspec
from msgspec import structs

from vipd.dns.asked_name import Known
from vipd.dns.names import reverse_name, text_of, wire
from vipd.dns.search_list import candidates
from vipd.dns.settings import (
    DnsSettings,
    Listen,
    answer_settings,
    parse_listen,
    zone_settings,
)
from vipd.dns.tracing import NO_NAME, Asked, Course, Trace
from vipd.proxy.config import DEFAULT_SOCKET
from vipd.proxy.control import read
from vipd.proxy.errors import ConfigError, ControlError
from vipd.proxy.names import parse_address

PATIENCE_SECONDS = 5.0
_CACHE, _STALE = "cache", "stale"


class Reply:
    """What came back. `seconds` is None where nobody was asked."""

    def __init__(
        self, message: dns.message.Message, way: str, seconds: float | None = None
    ) -> None:
        self.message, self.way, self.seconds = message, way, seconds
        self.whence = ""
        """Who answered it, where that is not this server; empty: not known."""
        self.stranger = ""
        """Where it was asked, if the daemon that was traced cannot have answered there."""

    @property
    def is_answer(self) -> bool:
        """Whether it holds records."""
        return bool(self.message.answer) and self.message.rcode() == dns.rcode.NOERROR

    @property
    def outcome(self) -> str:
        """How it ended, in a few words."""
        rcode = self.message.rcode()
        count = sum(len(one) for one in self.message.answer)
        if rcode == dns.rcode.NOERROR:
            ending = f"{count} record{'s' if count != 1 else ''}" if count else "no such records"
        else:
            ending = dns.rcode.to_text(rcode)
        own = ", authoritative" if self.message.flags & dns.flags.AA else ""
        took = "" if self.seconds is None else f", {self.seconds * 1000:.1f} ms"
        return f"{ending}{own} ({self.way}{took})"

    @property
    def said(self) -> str:
        """What the server says beside it (RFC 8914)."""
        found = [one for one in self.message.options if isinstance(one, dns.edns.EDEOption)]
        return "; ".join(
            f"{int(one.code)} {one.code.name} {one.text or ''}".rstrip() for one in found
        )

    def view(self) -> Mapping[str, object]:
        """Return it for programs."""
        return {
            "rcode": dns.rcode.to_text(self.message.rcode()),
            "authoritative": bool(self.message.flags & dns.flags.AA),
            "way": self.way,
            "milliseconds": None if self.seconds is None else round(self.seconds * 1000, 3),
            "said": self.said,
            "whence": self.whence,
        }


class Source(NamedTuple):
    """The names to ask one after the other with their traces, and who is asked."""

    names: Sequence[tuple[str, Trace | None]]
    ask: Callable[[str, Trace | None], Reply | None]
    """None is returned for a name that nobody here can answer."""


def question(name: str, kind: str | None) -> tuple[str, int]:
    """Return the name and the number of the type; an address becomes its reverse name.

    Raise ConfigError.
    """
    try:
        name, standard = text_of(reverse_name(parse_address(name).packed)), "PTR"
    except ValueError:
        standard = "A"
    try:
        wire(name)
        dns.name.from_text(name)
    except (dns.exception.DNSException, ValueError) as error:
        raise ConfigError("NAME", f"{name!r} is no name: {error}") from error
    try:
        return name, int(dns.rdatatype.from_text((kind or standard).upper()))
    except (dns.exception.DNSException, ValueError) as error:
        raise ConfigError("TYPE", f"{kind!r} is no type of record") from error


def online(
    asked: Asked, server: str | None, socket: str | None, domains: Sequence[str], *, trace: bool
) -> Source:
    """Return a server on the network; without `server`, where the daemon answers.

    The daemon is asked for what it knows if `trace`, or if a search list is needed and neither a
    server nor a cluster domain is told. Raise ConfigError and ControlError.
    """
    path = socket if socket is not None else DEFAULT_SOCKET
    to = _server(server, path)
    names: Sequence[tuple[str, Trace | None]] = [(_absolute(asked.name), None)]
    if trace or (asked.namespace and not domains and server is None):
        document = read(path, "dns-trace", msgspec.json.encode(asked).decode())
        names = _named(msgspec.json.decode(document, type=Course))
    elif asked.namespace:
        domain = (*domains, DnsSettings().domains[0])[0]
        names = [(one, None) for one in candidates(asked.name, asked.namespace, domain)]

    def ask(name: str, traced: Trace | None) -> Reply:
        if traced is None:
            return exchange(name, asked.type, to)
        if traced.ours:
            reply = exchange(name, asked.type, to)
            if is_somebody_elses(reply.message, traced):
                reply.stranger = str(to)
            return reply
        before = _counted(path)
        reply = exchange(name, asked.type, to)
        reply.whence = whence(before, _counted(path))
        return reply

    return Source(names, ask)


def is_somebody_elses(reply: dns.message.Message, traced: Trace) -> bool:
    """Return whether a reply to a name of the cluster cannot be that of the daemon of the trace.

    The daemon says of each such name that it is the authority, but where it knows nothing yet or
    refuses who asks.
    """
    if reply.rcode() in (dns.rcode.SERVFAIL, dns.rcode.REFUSED):
        return False
    if not reply.flags & dns.flags.AA:
        return True
    denied = reply.rcode() == dns.rcode.NXDOMAIN
    return traced.tail is None and denied != (traced.ending == NO_NAME)


def exchange(name: str, kind: int, to: Listen) -> Reply:
    """Ask over UDP, and over TCP where the reply does not fit. Raise ControlError."""
    message = dns.message.make_query(name, dns.rdatatype.RdataType.make(kind), use_edns=0)
    host, started = str(to.address), time.perf_counter()
    way = "UDP"
    try:
        reply = dns.query.udp(message, host, PATIENCE_SECONDS, to.port)
        if reply.flags & dns.flags.TC:
            way = "TCP, as UDP was too small"
            reply = dns.query.tcp(message, host, PATIENCE_SECONDS, to.port)
    except dns.exception.Timeout as error:
        raise ControlError(f"{to} gives no answer within {PATIENCE_SECONDS:g} s") from error
    except (OSError, EOFError, dns.exception.DNSException) as error:
        raise ControlError(f"{to}: {error}") from error
    return Reply(reply, f"{to}, {way}", time.perf_counter() - started)


def offline(asked: Asked, manifests: tuple[str, ...], told: Mapping[str, Any]) -> Source:
    """Return the zone that manifests make. Raise ConfigError, SourceError."""
    import click

    from vipd.dns.answer import Answers
    from vipd.dns.facts import facts_of
    from vipd.dns.feed import Kept
    from vipd.dns.forward import wire
    from vipd.dns.forward.got import Got
    from vipd.dns.server.traced import traced
    from vipd.dns.zone import Zone
    from vipd.proxy.cli.options import flags
    from vipd.proxy.config import load
    from vipd.proxy.events import Problem
    from vipd.proxy.snapshot import Snapshot, fold
    from vipd.proxy.sources import manifests as source

    config = load(flags(manifests, **told))
    settings = config.dns
    if settings.reverse is None:
        networks = (*config.node.cluster_cidrs, *config.node.service_cidrs)
        settings = structs.replace(settings, reverse=tuple(map(str, networks)))
    events = source.load(manifests)
    for one in events:
        if isinstance(one, Problem) and one.error:
            click.echo(f"vipd: {one.error}", err=True)
    snapshot, touched = fold(Snapshot(), events)
    kept = Kept(pods=settings.pods == "verified")
    kept.take(events, Snapshot(), snapshot, touched)
    zone = Zone(zone_settings(settings))
    for service in snapshot.services.values():
        facts = facts_of(service, snapshot.slices.get(service.name, ()))
        if facts is not None:
            zone.put(facts)
    for pod in (kept.pods or {}).values():
        zone.put_pod(pod)
    zone.namespaces(frozenset(kept.namespaces))
    zone.synced = True
    answers = Answers(zone, answer_settings(settings))
    known = Known(snapshot, settings, frozenset(kept.namespaces), kept.pods)

    def ask(name: str, _: Trace | None) -> Reply | None:
        message = dns.message.make_query(name, dns.rdatatype.RdataType.make(asked.type))
        found = answers.tcp(message.to_wire())
        if found is None or isinstance(found, bytes):
            made = found
        elif found.before:  # the rest is somebody else's
            got = Got(wire.reply(found.name, found.type))
            made = answers.finish(found, got, udp=False)
        else:
            return None
        return None if made is None else Reply(dns.message.from_wire(made), "from manifests")

    return Source(_named(traced(asked, known)), ask)


def whence(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return who answered a name of others, by what was counted meanwhile; empty: not known."""
    risen = {name for name, value in after.items() if value > before.get(name, 0.0)}
    upstreams = sorted(risen - {_CACHE, _STALE})
    if _STALE in risen:
        return "the cache, past the time to live: upstreams do not answer" if not upstreams else ""
    if _CACHE in risen:
        return "" if upstreams else "the cache"
    return f"upstream {', '.join(upstreams)}" if upstreams else ""


_SAMPLES = {
    "coredns_cache_hits_total": _CACHE,
    "coredns_cache_served_stale_total": _STALE,
    "coredns_proxy_request_duration_seconds_count": "",
}


def _counted(path: str) -> dict[str, float]:
    """Return what the daemon's workers have counted: cache hits, and replies of each upstream."""
    from vipd.dns.server.service import DnsStatus

    told = msgspec.json.decode(read(path, "dns"), type=DnsStatus)
    found: dict[str, float] = {}
    for worker in told.workers:
        for name, labels, value in worker.samples:
            if name in _SAMPLES:
                key = _SAMPLES[name] or dict(labels)["to"]
                found[key] = found.get(key, 0.0) + value
    return found


def _server(server: str | None, path: str) -> Listen:
    from vipd.proxy.status import Status

    if server is not None:
        try:
            return parse_listen(server)
        except ValueError as error:
            raise ConfigError("--server", str(error)) from error
    try:
        listens = msgspec.json.decode(read(path, "status"), type=Status).dns_listen
    except ControlError as error:
        raise ControlError(f"{error}; without a daemon: --server or --manifests") from error
    if not listens:
        raise ControlError("the daemon answers DNS nowhere (--dns-listen); name a --server")
    return parse_listen(listens[0])


def _named(course: Course) -> list[tuple[str, Trace | None]]:
    return [(one.name, one) for one in course.traces]


def _absolute(name: str) -> str:
    return name if name.endswith(".") else f"{name}."
