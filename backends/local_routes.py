"""Local routes to single addresses, ours by their protocol number: they make an address the node's.

Lives here: ``ip route add local ADDRESS dev lo table local proto NUMBER``, one for each service
address in the modes that answer on the address itself; done, listed, and what a refusal means.
Must not: decide which. Blocks: called beside an event loop.

pyroute2 encodes the same bytes, which the tests hold it against, in 0.2 ms a message.
Attribute numbers: include/uapi/linux/rtnetlink.h, Linux 6.1.
"""

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv6Address
from pathlib import Path
from typing import Literal, NamedTuple

from vipd.backends import netlink
from vipd.backends.netlink import (
    ACK,
    ADDRESS_FAMILY,
    CREATE,
    DUMP,
    EXCLUSIVE,
    HEADER,
    REPLACE,
    REQUEST,
    address,
    attribute,
    attributes,
    packed,
    u32,
)
from vipd.backends.protocol import Capability
from vipd.proxy.errors import DataplaneError, Rejected, Unsupported
from vipd.proxy.names import Address, Family, family_of

Verb = Literal["add", "replace", "del"]
_FLAGS: Mapping[Verb, int] = {"add": CREATE | EXCLUSIVE, "replace": CREATE | REPLACE, "del": 0}
_TABLE_LOCAL, _SCOPE_HOST, _TYPE_LOCAL = 255, 254, 2
_NEW_ROUTE, _DEL_ROUTE, _GET_ROUTE = 24, 25, 26
DNS_ROUTE_PROTOCOL = 117
"""Of the DNS server's routes. They have a metric of their own: a route of a mode to the same
address comes and goes beside them."""
_DNS_METRIC = 2048
_LOOPBACK = 1
"""Index of lo in every network namespace."""
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EAFNOSUPPORT)
"""Of a look-up: no route; an unreachable, prohibiting or blackhole one; IPv6 is switched off."""
_GONE = (errno.ENOENT, errno.ESRCH)
_NO_IPV6 = (errno.EACCES, errno.EOPNOTSUPP)
"""What a route of IPv6 is answered where disable_ipv6 is set for lo (for all is for lo as well, for
default is not, Linux 6.18), and where the kernel has no IPv6 (rtnetlink_rcv_msg)."""


def _passing_address(kind: int, flags: int) -> bytes:
    body = struct.pack("=BBBBI", ADDRESS_FAMILY[Family.IPV6], 128, 0, 0, _LOOPBACK)
    body += attribute(2, _NOBODYS.packed) + attribute(1, _NOBODYS.packed)
    return HEADER.pack(HEADER.size + len(body), kind, REQUEST | ACK | flags, 0, 0) + body


_NEW_ADDRESS, _DEL_ADDRESS = 20, 21
_NOBODYS = IPv6Address("100::7669:7064")
"""In the range whose packets are discarded (RFC 6666)."""
_REMEMBERED_NO_MORE = (
    _passing_address(_NEW_ADDRESS, CREATE | REPLACE),
    _passing_address(_DEL_ADDRESS, 0),
)
"""A connected socket of IPv6 keeps the route that it has until the table of that route changes, or
an address: a local route to where it sends is not seen (net/ipv6/ip6_fib.c: rt_genid_bump_ipv6 is
for addresses only, Linux 6.1 and 6.18). So an address comes and goes."""


class Wanted(NamedTuple):
    """A change of one route; `source` is the preferred source address, or empty."""

    verb: Verb
    address: Address
    source: str = ""


class SeenRoute(NamedTuple):
    """A route of the table local, as the kernel tells of it."""

    address: Address
    protocol: int
    source: str
    is_local: bool
    """Of type local: what is sent to the address is for this node."""


class LocalRoutes:
    """The local routes of this network namespace that carry one protocol number."""

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol

    def change(self, wanted: Sequence[Wanted]) -> dict[Wanted, DataplaneError]:
        """Make changes in order; return those that failed.

        A route of ours that is there already was added, and one that is not there was removed.
        Raise Unsupported where none was allowed.
        """
        if not wanted:
            return {}
        with netlink.routes() as socket:
            codes = socket.request([message(one, self.protocol) for one in wanted])
            if all(code == errno.EPERM for code in codes):
                raise Unsupported("CAP_NET_ADMIN", "run as root, or inside `unshare -Urnm`")
            if any(
                one.verb == "add" and one.address.version == 6 and not code
                for one, code in zip(wanted, codes, strict=True)
            ):
                # Whatever becomes of it, the routes are made.
                with contextlib.suppress(DataplaneError):
                    socket.request(_REMEMBERED_NO_MORE)
        failed = {one: code for one, code in zip(wanted, codes, strict=True) if code}
        if errno.EEXIST in failed.values():
            ours = {one.address for one in self.listed() if one.protocol == self.protocol}
            failed = {
                one: code
                for one, code in failed.items()
                if not (code == errno.EEXIST and one.address in ours)
            }
        return {
            one: _meaning(one, code, self.protocol)
            for one, code in failed.items()
            if not (one.verb == "del" and code in _GONE)
        }

    def listed(self) -> list[SeenRoute]:
        """Return the routes to single addresses in the table local, of both families."""
        return list(_listed())


def ipv6() -> Capability:
    """Return whether addresses of IPv6 can become the node's."""
    try:
        is_off = Path("/proc/sys", _SWITCH).read_text().strip() != "0"
    except OSError:
        return Capability("IPv6", False, "", "a kernel with IPv6 (no ipv6.disable=1)", False)
    if is_off:
        return Capability("IPv6", False, "", f"{_SWITCH.replace('/', '.')}=0 (all= sets it)", False)
    return Capability("IPv6", True, needed=False)


_SWITCH = "net/ipv6/conf/lo/disable_ipv6"


def is_own(address: Address) -> bool:
    """Return whether what is sent to an address is for this node, however that comes.

    Raise DataplaneError where the kernel cannot be asked.
    """
    six = address.version == 6
    body = struct.pack(
        "=BBBBBBBBI", ADDRESS_FAMILY[family_of(address)], 128 if six else 32, 0, 0, 0, 0, 0, 0, 0
    )
    body += attribute(1, address.packed)
    asking = HEADER.pack(HEADER.size + len(body), _GET_ROUTE, REQUEST | ACK, 0, 0) + body
    with netlink.routes() as socket:
        try:
            answers = socket.ask(asking)
        except DataplaneError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_ROUTE:
                return False
            raise
    return any(one[HEADER.size + 7] == _TYPE_LOCAL for one in answers)


def told(one: Wanted, protocol: int) -> str:
    """Return the change as `ip` would be told it."""
    six = "-6 " if family_of(one.address) is Family.IPV6 else ""
    source = f" src {one.source}" if one.source and one.verb != "del" else ""
    metric = f" metric {_DNS_METRIC}" if protocol == DNS_ROUTE_PROTOCOL else ""
    return (
        f"ip {six}route {one.verb} local {one.address} dev lo table local proto {protocol}"
        f"{metric}{source}"
    )


def message(one: Wanted, protocol: int) -> bytes:
    """Return the netlink message of a change."""
    six = one.address.version == 6
    body = struct.pack(
        "=BBBBBBBBI",
        ADDRESS_FAMILY[family_of(one.address)],
        128 if six else 32,
        0,
        0,
        _TABLE_LOCAL,
        protocol,
        0 if six else _SCOPE_HOST,
        _TYPE_LOCAL,
        0,
    )
    body += attribute(1, one.address.packed) + u32(4, _LOOPBACK)
    if one.source and one.verb != "del":
        body += attribute(7, packed(one.source))
    if protocol == DNS_ROUTE_PROTOCOL:
        body += u32(6, _DNS_METRIC)
    kind = _DEL_ROUTE if one.verb == "del" else _NEW_ROUTE
    flags = REQUEST | ACK | _FLAGS[one.verb]
    return HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body


def _listed() -> Iterable[SeenRoute]:
    for family in Family:
        # Strict checking picks the table.
        body = struct.pack("=BBBBBBBBI", ADDRESS_FAMILY[family], 0, 0, 0, _TABLE_LOCAL, 0, 0, 0, 0)
        asking = HEADER.pack(HEADER.size + len(body), _GET_ROUTE, REQUEST | DUMP, 0, 0) + body
        with netlink.routes() as socket:
            socket.strict()
            try:
                answers = socket.ask(asking)
            except DataplaneError:
                if family is Family.IPV6:
                    continue  # IPv6 is switched off
                raise
        yield from filter(None, map(_seen, answers))


def _seen(answer: bytes) -> SeenRoute | None:
    """Return a route of the listing, or None for one to more than an address."""
    length, table, protocol, kind = struct.unpack_from("=xBxxBBxB", answer, HEADER.size)
    found = dict(attributes(answer, HEADER.size + 12))
    if table != _TABLE_LOCAL or 1 not in found or length != len(found[1]) * 8:
        return None
    source = str(address(found[7])) if 7 in found else ""
    return SeenRoute(address(found[1]), protocol, source, kind == _TYPE_LOCAL)


def _meaning(one: Wanted, code: int, protocol: int) -> DataplaneError:
    if one.address.version == 6 and code in _NO_IPV6:
        return Rejected(told(one, protocol), "IPv6 is switched off on lo")
    if code == errno.EEXIST:
        return Rejected(told(one, protocol), "somebody else has a local route to this address")
    if code == errno.EINVAL and one.source:
        return Rejected(told(one, protocol), f"{one.source} is not an address of this node")
    return Rejected(told(one, protocol), os.strerror(code))
