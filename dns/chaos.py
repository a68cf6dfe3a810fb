"""What the server says of itself: CH TXT (RFC 4892), and NSID (RFC 5001) in the same words.

Lives here: the names and their records. Pure. Must not: know the zone.
"""

from vipd.dns.names import wire
from vipd.dns.records import CLASS_CHAOS, Type, character_string
from vipd.dns.replies import Fixed, fixed, pointer

_VERSION = frozenset(map(wire, ("version.bind", "version.server")))
_IDENTITY = frozenset(map(wire, ("id.server", "hostname.bind")))


def of_chaos(key: bytes, kind: int, version: str, identity: str) -> Fixed | None:
    """Return the sections of a reply, None to refuse: the name is unknown, or not to be told."""
    text = version if key in _VERSION else identity if key in _IDENTITY else ""
    if not text:
        return None
    if kind not in (Type.TXT, Type.ANY):
        return fixed(0, 0, 0, b"")
    data = character_string(text)
    head = pointer(0) + Type.TXT.to_bytes(2) + CLASS_CHAOS.to_bytes(2) + bytes(4)
    return fixed(1, 0, 0, head + len(data).to_bytes(2) + data)
