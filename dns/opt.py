"""OPT records of replies (RFC 6891).

Lives here: which options are told, and when. Pure. Must not: know why a question failed.
"""

from msgspec import Struct

from vipd.dns.message import Query
from vipd.dns.records import Type

NSID, KEEPALIVE, EXTENDED_ERROR = 3, 11, 15
_DNSSEC_OK = 0x8000


class OptSettings(Struct, frozen=True, kw_only=True):
    """What replies say of the server."""

    size: int
    """UDP payload size that it takes, bytes."""
    identity: bytes
    """NSID; empty: not told."""
    idle: int
    """How long TCP connections may be idle, in units of 100 ms (RFC 7828)."""


def opt_record(
    query: Query, settings: OptSettings, *, udp: bool, rcode: int, why: int | None
) -> bytes:
    """Return the OPT record for a reply; nothing to a query that has none."""
    if query.edns is None:
        return b""
    options = b""
    if why is not None:
        options += _option(EXTENDED_ERROR, why.to_bytes(2))
    for code, _ in query.edns.options:
        if code == NSID and settings.identity:
            options += _option(NSID, settings.identity)
        if code == KEEPALIVE and not udp:
            options += _option(KEEPALIVE, settings.idle.to_bytes(2))
    return plain_opt(settings.size, rcode, dnssec_ok=query.edns.dnssec_ok, options=options)


def plain_opt(size: int, rcode: int, *, dnssec_ok: bool, options: bytes = b"") -> bytes:
    """Return an OPT record of version 0."""
    flags = (_DNSSEC_OK if dnssec_ok else 0).to_bytes(2)
    head = b"\x00" + Type.OPT.to_bytes(2) + size.to_bytes(2) + bytes((rcode >> 4, 0)) + flags
    return head + len(options).to_bytes(2) + options


def _option(code: int, data: bytes) -> bytes:
    return code.to_bytes(2) + len(data).to_bytes(2) + data
