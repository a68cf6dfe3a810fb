"""What the operator decides about DNS: each field with its unit, default and reason.

Lives here: the settings, what makes them wrong, and what the zone and its answers are told of them.
Pure. Must not: read files or flags (proxy/config).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

from msgspec import Struct

from vipd.dns.decision import AnswerSettings
from vipd.dns.forward.hosts import parse_hosts
from vipd.dns.forward.settings import ForwardSettings, Problem
from vipd.dns.forward.settings import problems as problems_of_forwarding
from vipd.dns.forward.static import parse_record
from vipd.dns.names import starts, text_of, wire
from vipd.dns.reverse import ReverseNames
from vipd.dns.zone import ZoneSettings
from vipd.proxy.names import Address, Network, parse_address, parse_network

DNS_PORT, HTTP_PORT = 53, 9153
MOST_WORKERS = 64
MOST_LISTENS = 64
"""Addresses, each with two sockets in every worker."""
T = TypeVar("T")


class Listen(NamedTuple):
    """An address and port that is answered on, over UDP and TCP. Prints as it is written."""

    address: Address
    port: int = DNS_PORT

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


class DnsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """How the cluster's names are answered, where, and for whom."""

    listen: tuple[str, ...] = ()
    """ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT; port 53 where none is said; at most 64. Empty: no
    DNS server."""
    domains: tuple[str, ...] = ("cluster.local",)
    """Cluster domains, all with the same names; those in PTR records end in the first."""
    ttl: int = 5
    """Seconds, 0 to 3600: how long clients may remember a record. CoreDNS's; a longer one leaves
    clients with endpoints that are gone."""
    negative_ttl: int = 5
    """Seconds, 0 to 3600: the same of what does not exist. A service that was asked for too early
    must not stay unknown."""
    pods: Literal["disabled", "insecure", "verified"] = "disabled"
    """Names like 10-1-2-3.NAMESPACE.pod: none; any address; those of live pods. The specification
    dropped them in 1.1.0, and `insecure` gives anybody a name for any address."""
    namespaces: tuple[str, ...] = ()
    """Namespaces whose services have names; the others look like none. Empty: all."""
    reverse: tuple[str, ...] | None = None
    """CIDRs whose reverse names are all answered here, also where nobody has the address. Not said:
    clusterCIDRs and serviceCIDRs. Addresses of services are answered wherever they lie."""

    allow: tuple[str, ...] = ()
    """CIDRs that may ask beside this node, the cluster's nodes and pod networks. Others are
    refused: a resolver that is open to all is soon part of somebody's attack."""
    workers: int = 1
    """Processes, 1 to 64. One answers 60,000 questions a second or more; few nodes ask 10,000. Each
    holds the whole zone."""
    udp_size: int = 1232
    """Bytes, 512 to 4096, of the longest datagram sent: what passes everywhere unfragmented (DNS
    flag day 2020). The rest of a longer reply is had over TCP."""
    udp_buffer_bytes: int = 4 << 20
    """Bytes, 64 KiB to 256 MiB, of questions that wait in the kernel for each socket: 4 MiB hold
    about 10,000, which a worker answers in 0.1 s."""
    refusals_per_second: int = 5
    """REFUSED replies, 0 to 10000, to each source network (/24, /64) that may not ask; the rest is
    not answered, so that a forged source gains nothing."""
    tcp_connections: int = 1000
    """Connections, 1 to 100000, of a worker; the idlest of whoever has most goes where one more
    comes. About 3 KB each."""
    tcp_connections_of_client: int = 100
    """Connections, 1 to 100000, of one address; further ones push out its own idlest."""
    tcp_first_seconds: float = 3.0
    """Seconds, 0.1 to 60, until the first question; CoreDNS's."""
    tcp_idle_seconds: float = 10.0
    """Seconds, 0.1 to 600, without a whole question; CoreDNS's. RFC 7766 wants "a few"."""
    tcp_write_seconds: float = 5.0
    """Seconds, 0.1 to 60, for which a client may leave its replies unread; CoreDNS's."""
    waiting: int = 2000
    """Questions, 1 to 100000, that wait for upstreams in one worker; more get SERVFAIL. About 5 KB
    each."""
    waiting_of_client: int = 500
    """The same of one address: a pod must not take all places. Of the questions that are under way
    at upstreams it has a part of its own (`forward.questions_of_upstream`)."""
    prebuilt_bytes: int = 48 << 20
    """Bytes, 1 MiB to 1 GiB, of replies that a worker keeps ready; those of 10,000 services take
    about 10 MB."""

    http: tuple[str, ...] = ("127.0.0.1:9153",)
    """Where /metrics, /ready and /health are read over HTTP: as `listen`, also for all addresses at
    once, port 9153 (CoreDNS's) where none is said. Only this node: what a node asks for is nobody
    else's business unless the operator says so. Empty: nowhere. Only where DNS is answered."""
    query_log: Literal["off", "sampled", "full"] = "off"
    """Questions that the log tells. A line for each costs more than the answer."""
    query_log_every: int = 100
    """Of so many questions, 1 to 1000000, `sampled` tells one."""

    identity: str = ""
    """What is told to who asks which server this is (NSID, CH TXT id.server). Empty: nothing."""
    version: str = ""
    """The same for version.bind. Empty: nothing, as an attacker would be who wants to know."""
    forwards: bool = True
    """Whether other names are asked for at upstreams. Off: they are refused."""
    forward: ForwardSettings = ForwardSettings()
    """How."""


_LEAST_AND_MOST: tuple[tuple[str, str, float, float], ...] = (
    ("ttl", "ttl", 0, 3600),
    ("negative_ttl", "negativeTtl", 0, 3600),
    ("workers", "workers", 1, MOST_WORKERS),
    ("udp_size", "udpSize", 512, 4096),
    ("udp_buffer_bytes", "udpBufferBytes", 1 << 16, 1 << 28),
    ("refusals_per_second", "refusalsPerSecond", 0, 10_000),
    ("tcp_connections", "tcpConnections", 1, 100_000),
    ("tcp_connections_of_client", "tcpConnectionsOfClient", 1, 100_000),
    ("tcp_first_seconds", "tcpFirstSeconds", 0.1, 60),
    ("tcp_idle_seconds", "tcpIdleSeconds", 0.1, 600),
    ("tcp_write_seconds", "tcpWriteSeconds", 0.1, 60),
    ("waiting", "waiting", 1, 100_000),
    ("waiting_of_client", "waitingOfClient", 1, 100_000),
    ("prebuilt_bytes", "prebuiltBytes", 1 << 20, 1 << 30),
    ("query_log_every", "queryLogEvery", 1, 1_000_000),
)


def problems(settings: DnsSettings) -> list[Problem]:
    """Return all that is wrong, in the order of the fields; empty where nothing is."""
    found: list[Problem] = []
    for field, texts in (("listen", settings.listen), ("http", settings.http)):
        if len(texts) > MOST_LISTENS:
            found.append(Problem(field, f"{len(texts)} addresses; at most {MOST_LISTENS}"))
    for at, text in enumerate(settings.listen):
        found += _tried(f"listen[{at}]", parse_listen, text)
    for at, text in enumerate(settings.http):
        found += _tried(f"http[{at}]", parse_http, text)
    if not settings.domains:
        found.append(Problem("domains", "must not be empty"))
    for at, text in enumerate(settings.domains):
        found += _tried(f"domains[{at}]", domain, text)
    for at, text in enumerate(settings.reverse or ()):
        found += _tried(f"reverse[{at}]", parse_network, text)
    for at, text in enumerate(settings.allow):
        found += _tried(f"allow[{at}]", parse_network, text)
    for attribute, field, least, most in _LEAST_AND_MOST:
        value = getattr(settings, attribute)
        if not least <= value <= most:
            found.append(Problem(field, f"{value} is not from {least} to {most}"))
    for field, text in (("identity", settings.identity), ("version", settings.version)):
        if len(text.encode()) > 255:
            found.append(Problem(field, "is longer than 255 bytes"))
    of_forwarding = [
        Problem(f"forward.{one.field}", one.reason)
        for one in problems_of_forwarding(settings.forward)
    ]
    if not found and not of_forwarding:
        of_forwarding = list(_never_used(settings))
    return found + of_forwarding


def _never_used(settings: DnsSettings) -> Iterator[Problem]:
    """Yield what is said of names that the cluster's zone answers for: nobody would be told it.

    Of `reverse` only what is written there is known here.
    """
    forward = settings.forward
    networks = [parse_network(one) for one in settings.reverse or ()]
    names = [(f"stubDomains[{one}]", one, wire(one)) for one in forward.stub_domains]
    for at, line in enumerate(forward.hosts):
        hosts = parse_hosts(line).hosts
        names += [(f"hosts[{at}]", text_of(one.name), one.name) for one in hosts]
    for at, text in enumerate(forward.records):
        name = parse_record(text, forward.hosts_ttl).name
        names.append((f"records[{at}]", text_of(name), name))
    for field, text, name in names:
        owner = _zone_of(name, settings.domains, networks)
        if owner:
            why = f"{text!r} is in {owner}, which is answered from the cluster's objects alone"
            yield Problem(f"forward.{field}", f"{why}: it would never be used")


def _zone_of(name: bytes, domains: Sequence[str], networks: Sequence[Network]) -> str:
    """Return in words where a name lies that the cluster's zone answers for; empty: nowhere."""
    lower = name.lower()
    ends = {lower[at:] for at in starts(lower)}
    for one in domains:
        if wire(one) in ends:
            return f"the cluster domain {one}"
    for network in networks:
        if ReverseNames([network]).place(lower) is not None:
            return f"the reverse zone of {network}"
    return ""


def parse_listen(text: str) -> Listen:
    """Read ``ADDRESS``, ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``. Raise ValueError."""
    made = _place(text, DNS_PORT)
    if made.address.is_unspecified:
        why = "replies would leave from another address than was asked; name the node's addresses"
        raise ValueError(f"{text!r} is every address: {why}")
    return made


def parse_http(text: str) -> Listen:
    """Read the same for HTTP, where it may be every address. Raise ValueError."""
    return _place(text, HTTP_PORT)


def _place(text: str, default_port: int) -> Listen:
    host, port = text, ""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        port = f":{port}"
    try:
        address = parse_address(host)
    except ValueError:
        raise ValueError(f"{text!r} is no ADDRESS:PORT") from None
    digits = port[1:] if port else str(default_port)
    if port[:1] not in ("", ":") or not (digits.isdecimal() and digits.isascii()):
        raise ValueError(f"{text!r} has no number behind the colon")
    if int(digits) > 65535:
        raise ValueError(f"{text!r}: {digits} is no port")
    if address.version == 6 and (address.is_link_local or "%" in host):
        why = "an IPv6 address of one interface's link; name one that is the node's"
        raise ValueError(f"{text!r} is {why}")
    if address.is_multicast:
        raise ValueError(f"{text!r} is a multicast address")
    return Listen(address, int(digits))


def listens(settings: DnsSettings) -> tuple[Listen, ...]:
    """Return where is answered. Raise ValueError."""
    return tuple([parse_listen(text) for text in settings.listen])


def domain(text: str) -> bytes:
    """Return a cluster domain as wire name. Raise ValueError for what is none."""
    made = wire(text)
    if made == b"\0":
        raise ValueError(f"{text!r} is the root: every name would be the cluster's")
    return made


def zone_settings(settings: DnsSettings) -> ZoneSettings:
    """Return what the zone is told; `reverse` has to be filled in."""
    addresses = [one.address for one in listens(settings)]
    return ZoneSettings(
        domains=settings.domains,
        ttl=settings.ttl,
        negative_ttl=settings.negative_ttl,
        pods=settings.pods,
        reverse=tuple([parse_network(text) for text in settings.reverse or ()]),
        name_server_addresses=tuple(dict.fromkeys(one for one in addresses if not one.is_loopback)),
        exposed=frozenset(settings.namespaces) or None,
    )


def answer_settings(settings: DnsSettings) -> AnswerSettings:
    """Return what is told to who makes the replies."""
    return AnswerSettings(
        udp_size=settings.udp_size,
        forwards=settings.forwards,
        identity=settings.identity,
        version=settings.version,
        tcp_idle_seconds=settings.tcp_idle_seconds,
        prebuilt_bytes=settings.prebuilt_bytes,
    )


def _tried(field: str, parse: Callable[[str], T], text: str) -> list[Problem]:
    try:
        parse(text)
    except ValueError as error:
        return [Problem(field, str(error))]
    return []
