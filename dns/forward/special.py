"""Names that no upstream is asked for, for they mean nothing there or give something away.

Lives here: which they are, and what they are answered. Pure. Must not: know upstreams, or names
that the operator has given records (static.py).
Sources: RFC 6761 (localhost, invalid), RFC 6762 (local), RFC 7686 (onion), RFC 6303 (reverse).
"""

from enum import Enum

from vipd.dns import names
from vipd.dns.forward import wire
from vipd.dns.forward.got import Got
from vipd.dns.forward.static import denial

TTL = 3600
"""Seconds. These do not change; a client need not ask again soon."""
_ADDRESSES = frozenset({wire.A, wire.AAAA, wire.SVCB, wire.HTTPS})
"""Types that are asked to reach a host: SVCB and HTTPS too."""
_IPV4 = b"\x7f\0\0\x01"
_IPV6 = bytes(15) + b"\x01"


class Special(Enum):
    """What becomes of a domain and all that is below."""

    LOCALHOST = "localhost"
    """The addresses of loopback."""
    LOCALHOST_REVERSE = "localhost, reverse"
    NOTHING = "nothing"
    """It does not exist."""


def _wire(*texts: str) -> tuple[bytes, ...]:
    return tuple(names.wire(text) for text in texts)


_NOWHERE = _wire(
    *("invalid", "onion", "local"),
    # What RFC 6303 says of "this" network, loopback, link-local, documentation and broadcast
    *("0.in-addr.arpa", "127.in-addr.arpa", "254.169.in-addr.arpa", "2.0.192.in-addr.arpa"),
    *("100.51.198.in-addr.arpa", "113.0.203.in-addr.arpa", "255.255.255.255.in-addr.arpa"),
    *("8.e.f.ip6.arpa", "9.e.f.ip6.arpa", "a.e.f.ip6.arpa", "b.e.f.ip6.arpa"),
    *("8.b.d.0.1.0.0.2.ip6.arpa", "0." * 32 + "ip6.arpa"),
)
_PRIVATE = _wire(
    *("10.in-addr.arpa", "168.192.in-addr.arpa", "d.f.ip6.arpa"),
    *(f"{second}.172.in-addr.arpa" for second in range(16, 32)),
)
_LOOPBACK_REVERSE = _wire("1.0.0.127.in-addr.arpa", "1." + "0." * 31 + "ip6.arpa")


def special_domains(*, forward_private_reverse: bool) -> dict[bytes, Special]:
    """Return the domains that are answered here; the longest that a name is below counts."""
    found = dict.fromkeys(_NOWHERE, Special.NOTHING)
    if not forward_private_reverse:
        found |= dict.fromkeys(_PRIVATE, Special.NOTHING)
    found |= dict.fromkeys(_LOOPBACK_REVERSE, Special.LOCALHOST_REVERSE)
    found[names.wire("localhost")] = Special.LOCALHOST
    return found


def is_address_of_single_label(name: bytes, qtype: int) -> bool:
    """Whether a host is looked for by one label, which belongs to no domain."""
    return qtype in _ADDRESSES and name != b"\0" and len(name) == name[0] + 2


def answer(name: bytes, qtype: int, domain: bytes, special: Special) -> Got:
    """Return the reply for a name that is below a special domain, or is that domain."""
    answers: tuple[bytes, ...] = ()
    rcode = wire.NOERROR
    if special is Special.NOTHING:
        # The domain itself is a name like any other: RFC 6303 zones have an apex.
        rcode = wire.NOERROR if name == domain and domain.endswith(b"\x04arpa\0") else wire.NXDOMAIN
    elif special is Special.LOCALHOST_REVERSE:
        if name != domain:
            rcode = wire.NXDOMAIN
        elif qtype == wire.PTR:
            answers = (wire.record(wire.PTR, TTL, b"\x09localhost\0"),)
    elif qtype == wire.A:
        answers = (wire.record(wire.A, TTL, _IPV4),)
    elif qtype == wire.AAAA:
        answers = (wire.record(wire.AAAA, TTL, _IPV6),)
    if answers:
        return Got(wire.reply(name, qtype, answers=answers))
    return Got(denial(name, qtype, rcode, domain, TTL))
