"""What the operator decides about forwarding: each field with its unit, default and reason.

Lives here: the settings, and what makes them wrong. Pure. Must not: read files.
"""

from collections.abc import Callable
from enum import StrEnum

from msgspec import Struct

from vipd.dns import names
from vipd.dns.forward.hosts import parse_hosts
from vipd.dns.forward.static import parse_record
from vipd.dns.forward.upstream import parse_upstream

SYSTEMD_STUBS = ("127.0.0.53", "127.0.0.54")
"""systemd-resolved's own listeners: what it is told by the network stands in another file."""

PARTS = 4
"""One client may have one of so many parts of what all have together."""


class Policy(StrEnum):
    """Which upstream of several is asked first."""

    FASTEST = "fastest"
    """One of those about as fast as the fastest; now and then another, to know how it does."""
    IN_ORDER = "inOrder"
    """The first that answers, as glibc does."""
    RANDOM = "random"
    """Any, as CoreDNS does."""


class CacheSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """How long and how much is remembered of what upstreams say. Cluster names are never cached."""

    most_bytes: int = 16 << 20
    """Bytes of memory for all entries, what Python needs for each included; 0: nothing is cached.
    16 MiB hold about 25,000 usual replies, more than CoreDNS's two times 9,984 entries."""
    denial_share: float = 0.25
    """Share of the bytes, 0.01 to 0.99, that denials and failures may take: names that do not exist
    are free to make up, so they must not push out those that do."""
    least_ttl: int = 0
    """Seconds. The owner of a name knows why a TTL is short (CoreDNS makes at least 5 of it)."""
    most_ttl: int = 3600
    """Seconds. A wrong record should not outlive an hour here; the same as CoreDNS's."""
    most_denial_ttl: int = 30
    """Seconds. A name that was asked for too early must not stay unknown for half an hour."""
    most_failure_ttl: int = 5
    """Seconds, 1 to 300 (RFC 9520). Starts at 1 and doubles while the question goes on failing."""
    prefetch: bool = True
    """Whether a positive reply that is asked for in the last tenth of its time is asked for again
    then, so that nobody waits for names in use. At most one question more for each TTL."""
    stale_seconds: int = 86_400
    """Seconds behind its end for which a positive reply may still be given when upstreams fail
    (RFC 8767 says one to three days); 0: never. Denials are never given stale."""
    stale_ttl: int = 30
    """Seconds, the TTL of stale records; RFC 8767's."""
    stale_wait_seconds: float = 0.1
    """Seconds that a client waits for a fresh reply before it gets the stale one. RFC 8767 says 1.8
    for resolvers that walk the whole tree; upstreams here are near."""
    stale_recheck_seconds: int = 30
    """Seconds after a failure in which the stale reply is given at once; RFC 8767's."""


class ForwardSettings(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"
):
    """How names are answered that are not the cluster's."""

    upstreams: tuple[str, ...] = ()
    """ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, after ``tcp://`` for TCP only; for all names without
    a stub domain. Empty (the default): those of `resolv_conf`."""
    resolv_conf: str = "/etc/resolv.conf"
    """A file, watched; used where `upstreams` is empty. Where it names only systemd-resolved's own
    listener, /run/systemd/resolve/resolv.conf is read instead. Empty: none."""
    stub_domains: dict[str, tuple[str, ...]] = {}
    """Upstreams of single domains and what is below; the longest domain counts. An empty list: such
    names do not exist."""
    policy: Policy = Policy.FASTEST
    """Upstreams differ by a hundred times in distance, and who is fast now is not ill."""

    question_seconds: float = 4.0
    """Seconds until SERVFAIL, whatever was tried: sooner than the 5 after which a client asks
    again."""
    first_timeout_seconds: float = 0.4
    """Seconds until another upstream is tried, while nothing is known of the first: unbound's
    0.376, rounded. Later: smoothed round-trip time + 4 × its deviation."""
    least_timeout_seconds: float = 0.05
    """Seconds; less would ask twice whatever an upstream does not know by heart."""
    most_timeout_seconds: float = 2.0
    """Seconds; half of `question_seconds`, so that somebody else has a chance."""
    attempts: int = 6
    """Times that a question is sent, to all upstreams together."""
    failures_before_down: int = 2
    """Consecutive failures after which an upstream is asked last. One success brings it back."""

    questions: int = 1000
    """Different questions under way; more are answered SERVFAIL at once. About 8 KB each, and as
    many sockets as upstreams are tried at a time; CoreDNS's manifests say 1000 too."""
    questions_of_upstream: int = 500
    """Questions under way with one upstream, each with one or two sockets: a dead one must not take
    all. One client may have a quarter of this, or of `questions` if that is less: who asks for
    names that nobody answers must not take forwarding away from the others."""
    waiters: int = 2000
    """Those who wait for the same question; further ones get SERVFAIL at once. Four times as many
    as `waitingOfClient`, so that one client does not take all places."""
    tcp_connections: int = 4
    """Connections to one upstream, each with up to 64 questions under way."""
    tcp_idle_seconds: float = 10.0
    """Seconds that an unused connection is kept; as CoreDNS."""
    chain: int = 10
    """CNAMEs that are followed for one question; as CoreDNS."""
    message_bytes: int = 65_535
    """Bytes, 512 to 65535: larger replies fail. They come over TCP only."""

    randomize_case: bool = True
    """Spell names with random capitals and want them back (0x20): about one bit for each letter
    against forged replies. Upstreams that do not give them back are noticed."""
    cookies: bool = True
    """Send DNS cookies (RFC 7873), and insist on them where an upstream has sent one back."""
    trust_ad: bool = False
    """Tell clients what upstreams say of DNSSEC (AD). Right only where the way to them is safe.
    Also set by ``options trust-ad`` in `resolv_conf`."""
    refuse_private: bool = False
    """Drop private, link-local and loopback addresses from replies of the default upstreams (DNS
    rebinding). Off: names of a company's own network usually have such addresses."""
    loop_check: bool = True
    """Ask every upstream for a name nobody else knows; one through which the question comes back is
    left out until it does no more. Looked at again every 30 s."""

    forward_single_labels: bool = False
    """Forward addresses of names with one label. Off: hardly any top-level domain has one, and what
    is asked is the name of a service that somebody mistyped, which is nobody else's business."""
    forward_private_reverse: bool = True
    """Forward reverse names of private networks (RFC 6303). On: a company's servers know them. Off:
    they do not exist."""

    hosts: tuple[str, ...] = ()
    """Lines as in hosts(5): ADDRESS NAME…. Reverse names follow from them."""
    hosts_file: str = ""
    """A file of such lines, watched; at most 1 MiB. Empty: none."""
    records: tuple[str, ...] = ()
    """``NAME [TTL] TYPE DATA`` as in zone files, without quotes around it; not of types SOA, NS,
    DNAME, RRSIG, NSEC. A name with records exists here only."""
    hosts_ttl: int = 30
    """Seconds, for hosts and for records without a TTL: as long as a change may take to be seen."""

    cache: CacheSettings = CacheSettings()

    @property
    def questions_of_client(self) -> int:
        """Different questions of one client that may be under way."""
        return max(1, min(self.questions, self.questions_of_upstream) // PARTS)


class Problem(Struct, frozen=True):
    """What is wrong with a setting. `field` is spelled as in the file: ``cache.mostBytes``."""

    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


_LEAST_AND_MOST: tuple[tuple[str, float, float], ...] = (
    ("questionSeconds", 0.1, 30),
    ("firstTimeoutSeconds", 0.01, 10),
    ("leastTimeoutSeconds", 0.001, 10),
    ("mostTimeoutSeconds", 0.01, 30),
    ("attempts", 1, 32),
    ("failuresBeforeDown", 1, 1000),
    ("questions", 1, 100_000),
    ("questionsOfUpstream", 1, 100_000),
    ("waiters", 1, 100_000),
    ("tcpConnections", 1, 64),
    ("tcpIdleSeconds", 0.1, 3600),
    ("chain", 1, 64),
    ("messageBytes", 512, 65_535),
    ("hostsTtl", 0, 86_400),
)
_LEAST_AND_MOST_OF_CACHE: tuple[tuple[str, float, float], ...] = (
    ("mostBytes", 0, 1 << 34),
    ("denialShare", 0.01, 0.99),
    ("leastTtl", 0, 3600),
    ("mostTtl", 1, 604_800),
    ("mostDenialTtl", 1, 86_400),
    ("mostFailureTtl", 1, 300),
    ("staleSeconds", 0, 604_800),
    ("staleTtl", 1, 3600),
    ("staleWaitSeconds", 0, 10),
    ("staleRecheckSeconds", 1, 3600),
)


def problems(settings: ForwardSettings) -> list[Problem]:
    """Return all that is wrong, in the order of the fields; empty where nothing is."""
    found = [
        *_out_of_range(settings, "", _LEAST_AND_MOST),
        *_out_of_range(settings.cache, "cache.", _LEAST_AND_MOST_OF_CACHE),
    ]
    for at, text in enumerate(settings.upstreams):
        found += _tried(f"upstreams[{at}]", parse_upstream, text)
    for domain, upstreams in settings.stub_domains.items():
        found += _tried(f"stubDomains[{domain}]", names.wire, domain)
        for at, text in enumerate(upstreams):
            found += _tried(f"stubDomains[{domain}][{at}]", parse_upstream, text)
    for at, line in enumerate(settings.hosts):
        found += [Problem(f"hosts[{at}]", reason) for _, reason in parse_hosts(line).left_out]
    for at, text in enumerate(settings.records):
        found += _tried(f"records[{at}]", lambda one: parse_record(one, settings.hosts_ttl), text)
    if settings.least_timeout_seconds > settings.most_timeout_seconds:
        found.append(Problem("leastTimeoutSeconds", "is more than mostTimeoutSeconds"))
    if settings.cache.least_ttl > settings.cache.most_ttl:
        found.append(Problem("cache.leastTtl", "is more than cache.mostTtl"))
    return found


def _out_of_range(
    settings: Struct, prefix: str, bounds: tuple[tuple[str, float, float], ...]
) -> list[Problem]:
    attribute = dict(
        zip(settings.__struct_encode_fields__, settings.__struct_fields__, strict=True)
    )
    values = [(field, getattr(settings, attribute[field]), *rest) for field, *rest in bounds]
    return [
        Problem(prefix + field, f"{value} is not from {least} to {most}")
        for field, value, least, most in values
        if not least <= value <= most
    ]


def _tried(field: str, parse: Callable[[str], object], text: str) -> list[Problem]:
    try:
        parse(text)
    except ValueError as error:
        return [Problem(field, str(error))]
    return []
