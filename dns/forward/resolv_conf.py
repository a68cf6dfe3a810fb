"""resolv.conf(5): who is asked when nothing else is configured.

Lives here: reading its text. Pure. Must not: open the file (sources.py).

`nameserver` lines count, all of them (glibc takes three), and of `options` ``use-vc`` (TCP only)
and ``trust-ad``. Search lists, ndots, timeouts and rotation are the business of stub resolvers.
"""

from msgspec import Struct

from vipd.dns.forward.upstream import Upstream, parse_upstream

MOST_NAME_SERVERS = 15
"""As many as CoreDNS takes; further ones are named as left out."""


class ResolvConf(Struct, frozen=True):
    """What a resolv.conf says."""

    upstreams: tuple[Upstream, ...] = ()
    """In the order of the file, each once."""
    trust_ad: bool = False
    left_out: tuple[str, ...] = ()
    """One sentence for each line that counts and could not be taken, with its number."""


def parse_resolv_conf(text: str) -> ResolvConf:
    """Read the text of a resolv.conf. What it does not know is passed over, as everywhere."""
    found: dict[Upstream, None] = {}
    left_out: list[str] = []
    tcp = trust_ad = False
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split(";")[0].split()
        if not words:
            continue
        if words[0] == "options":
            tcp = tcp or "use-vc" in words
            trust_ad = trust_ad or "trust-ad" in words
        elif words[0] == "nameserver":
            try:
                upstream = _name_server(words[1:])
            except ValueError as error:
                left_out.append(f"line {number}: {error}")
                continue
            if len(found) < MOST_NAME_SERVERS:
                found[upstream] = None
            elif upstream not in found:
                left_out.append(f"line {number}: more than {MOST_NAME_SERVERS} name servers")
    upstreams = tuple(Upstream(one.address, one.port, tcp) for one in found)
    return ResolvConf(upstreams, trust_ad, tuple(left_out))


def _name_server(words: list[str]) -> Upstream:
    if not words:
        raise ValueError("nameserver without an address")
    # No port is possible here; glibc takes an address and nothing else.
    if words[0].count(":") == 1 or words[0].startswith(("[", "tcp:", "udp:")):
        raise ValueError(f"{words[0]!r} is no IP address")
    return parse_upstream(words[0])
