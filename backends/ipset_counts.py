"""How many entries each set of ipset has, without listing one of them.

Lives here: that one listing. Must not: know what sets are for. ipset tells nobody of changes
(net/netfilter/ipset sends no notifications), so this is what can be asked often.
Source: include/uapi/linux/netfilter/ipset/ip_set.h, Linux 6.1.
"""

import struct

from vipd.backends import netlink
from vipd.backends.netlink import ACK, DUMP, HEADER, REQUEST, attribute, attributes

_LIST = 6 << 8 | 7  # NFNL_SUBSYS_IPSET, IPSET_CMD_LIST
_PROTOCOL, _SETNAME, _FLAGS, _DATA, _ELEMENTS = 1, 2, 6, 7, 24
_HEADERS_ONLY = 1 << 2
_NETWORK_ORDER = 0x4000
_VERSION = 6
_GENERAL = struct.pack("=BBH", 2, 0, 0)


def held() -> dict[str, int]:
    """Return the number of entries of every set there is. Raise DataplaneError."""
    said = _GENERAL + attribute(_PROTOCOL, bytes([_VERSION]))
    said += attribute(_FLAGS | _NETWORK_ORDER, struct.pack(">I", _HEADERS_ONLY))
    asking = HEADER.pack(HEADER.size + len(said), _LIST, REQUEST | ACK | DUMP, 0, 0) + said
    with netlink.netfilter() as socket:
        return dict(map(_counted, socket.ask(asking)))


def _counted(answer: bytes) -> tuple[str, int]:
    told = dict(attributes(answer, HEADER.size + len(_GENERAL)))
    name = told.get(_SETNAME, b"").rstrip(b"\0").decode(errors="replace")
    elements = dict(attributes(told.get(_DATA, b""), 0)).get(_ELEMENTS, b"\0")
    return name, int.from_bytes(elements, "big")
