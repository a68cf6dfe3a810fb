"""Return paths in the kernel: an nft table, a policy rule and a route for each family.

Lives here: the effects, and what of them there is. Must not: decide whether there is to be one
(compile.py), nor when it may go (driver.py). What the rules say is in return_path.py.

Rule and route are recognised by their table and protocol number: 119 both.
"""

import asyncio
import contextlib
import errno
import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from vipd.backends import netlink
from vipd.backends.netlink import (
    ACK,
    ADDRESS_FAMILY,
    CREATE,
    DUMP,
    EXCLUSIVE,
    HEADER,
    REQUEST,
    attribute,
    attributes,
    u32,
)
from vipd.backends.nftables.objects import FAMILY_WORD
from vipd.backends.nftables.tool import Nft
from vipd.backends.userspace.return_path import (
    PRIORITY,
    ROUTE_TABLE,
    TABLE,
    commands,
    is_right,
)
from vipd.proxy.errors import DataplaneError, Rejected, UnknownResult, Unsupported
from vipd.proxy.names import Family

INCOMPLETE = "incomplete"
"""Instead of the mark, where a part is missing or another than ours."""
_NEW_ROUTE, _DEL_ROUTE, _GET_ROUTE = 24, 25, 26
_NEW_RULE, _DEL_RULE, _GET_RULE = 32, 33, 34
_SCOPE_HOST, _TYPE_LOCAL, _LOOPBACK, _TO_TABLE = 254, 2, 1, 1
_OIF = 4
_RULE_PRIORITY, _RULE_MARK, _RULE_MASK, _RULE_PROTOCOL = 6, 10, 16, 21
"""linux/fib_rules.h; the header of a rule has the size and the fields of a route's."""

_NO_TABLE = (errno.ENOENT, errno.ESRCH)
"""What a listing of a table that nobody made is refused with."""
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EOPNOTSUPP)
"""And one of IPv6 where the kernel has none, or it is switched off (ipv6.disable=1)."""


class ReturnPaths:
    """The return paths of this network namespace."""

    def __init__(self, nft: Nft) -> None:
        self._nft = nft

    async def observe(self) -> dict[Family, str]:
        """Return the mark of each family of which there is anything, or INCOMPLETE."""
        there = await self._nft.tables()
        routing = await asyncio.to_thread(_routing)
        found: dict[Family, str] = {}
        for family, word in FAMILY_WORD.items():
            rules, has_route = routing[family]
            has_table = (word, TABLE) in there
            if not (rules or has_route or has_table):
                continue
            found[family] = INCOMPLETE
            mark = hex(rules[0].mark) if rules else ""
            if has_table and has_route and rules and rules == _rules(mark):
                listing = await self._nft.run(["--json", "list", "table", word, TABLE])
                try:
                    if is_right(family, mark, listing):
                        found[family] = mark
                except (msgspec.DecodeError, LookupError, TypeError) as error:
                    raise UnknownResult(f"nft's listing is not understood: {error!r}") from error
        return found

    async def bring(self, family: Family, mark: str) -> None:
        """Let there be a return path with this mark, whatever there is of one."""
        await asyncio.to_thread(_route, family, mark)
        await self._nft.run(["-f", "-"], "".join(f"{one}\n" for one in commands(family, mark)))

    async def remove(self, families: Collection[Family]) -> None:
        """Take everything of these families away, also what is there in part only."""
        there = await self._nft.tables()
        words = [FAMILY_WORD[one] for one in families if (FAMILY_WORD[one], TABLE) in there]
        if words:
            text = "".join(f"delete table {word} {TABLE}\n" for word in words)
            await self._nft.run(["-f", "-"], text)
        for family in families:
            await asyncio.to_thread(_route, family, "")


def wrong_settings(root: Path = Path("/proc/sys/net/ipv4/conf")) -> list[str]:
    """Return the settings of this network namespace that keep answers of IPv4 from arriving.

    With src_valid_mark the kernel asks for the way back to the source of a packet with the
    packet's mark, and so is told that an endpoint is the node itself: a martian, whatever
    rp_filter says (fib_validate_source in net/ipv4/fib_frontend.c; the setting of all interfaces
    and that of one are or-ed).
    """
    found = []
    for one in sorted(root.glob("*/src_valid_mark")):
        name = one.parent.name
        with contextlib.suppress(OSError):  # the interface has gone meanwhile
            if name != "default" and one.read_text().strip() != "0":
                found.append(f"net.ipv4.conf.{name}.src_valid_mark")
    return found


class _Rule(NamedTuple):
    """What a policy rule of ours says."""

    mark: int
    mask: int
    priority: int


def _rules(mark: str) -> list[_Rule]:
    return [_Rule(int(mark, 16), int(mark, 16), PRIORITY)] if mark else []


def _route(family: Family, mark: str) -> None:
    """Let there be the route, and one rule with this mark; an empty text: none of both."""
    wanted = _rules(mark)
    rules, has_route = _routing_of(family)
    todo: list[tuple[int, int, bytes]] = []
    if bool(wanted) != has_route:
        kind, flags = (_NEW_ROUTE, CREATE | EXCLUSIVE) if wanted else (_DEL_ROUTE, 0)
        todo.append((kind, flags, _route_body(family)))
    new = [one for one in wanted if one not in rules]
    todo += [(_NEW_RULE, CREATE | EXCLUSIVE, _rule_body(family, one)) for one in new]
    todo += [(_DEL_RULE, 0, _rule_body(family, one)) for one in rules if one not in wanted]
    messages = [
        HEADER.pack(HEADER.size + len(body), kind, REQUEST | ACK | flags, 0, 0) + body
        for kind, flags, body in todo
    ]
    if not messages:
        return
    with netlink.routes() as socket:
        code = next(filter(None, socket.request(messages)), 0)
    if code in (errno.EPERM, errno.EACCES):
        raise Unsupported("CAP_NET_ADMIN", "run as root, or inside `unshare -Urnm`")
    if code:
        raise Rejected(f"return path of {family}", os.strerror(code))


def _route_body(family: Family) -> bytes:
    scope = _SCOPE_HOST if family is Family.IPV4 else 0
    body = _header(family, ROUTE_TABLE, ROUTE_TABLE, scope, _TYPE_LOCAL)
    return body + u32(_OIF, _LOOPBACK)


def _rule_body(family: Family, rule: _Rule) -> bytes:
    body = _header(family, ROUTE_TABLE, 0, 0, _TO_TABLE)
    body += u32(_RULE_PRIORITY, rule.priority)
    body += u32(_RULE_MARK, rule.mark) + u32(_RULE_MASK, rule.mask)
    return body + attribute(_RULE_PROTOCOL, bytes([ROUTE_TABLE]))


def _header(family: Family, table: int, protocol: int, scope: int, kind: int) -> bytes:
    """Return struct rtmsg, or struct fib_rule_hdr, in which `kind` is the action."""
    address_family = ADDRESS_FAMILY[family]
    return struct.pack("=BBBBBBBBI", address_family, 0, 0, 0, table, protocol, scope, kind, 0)


def _routing() -> dict[Family, tuple[list[_Rule], bool]]:
    return {family: _routing_of(family) for family in Family}


def _routing_of(family: Family) -> tuple[list[_Rule], bool]:
    """Return the family's policy rules of ours, and whether the route is there."""
    rules = [
        _Rule(*(_number(found.get(one)) for one in (_RULE_MARK, _RULE_MASK, _RULE_PRIORITY)))
        for table, _, found in _listed(family, _GET_RULE, 0)
        if table == ROUTE_TABLE and found.get(_RULE_PROTOCOL) == bytes([ROUTE_TABLE])
    ]
    routes = [
        protocol
        for table, protocol, _ in _listed(family, _GET_ROUTE, ROUTE_TABLE)
        if (table, protocol) == (ROUTE_TABLE, ROUTE_TABLE)
    ]
    return rules, bool(routes)


def _number(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value is not None else 0


def _listed(family: Family, asked: int, table: int) -> Iterator[tuple[int, int, dict[int, bytes]]]:
    """Yield table, protocol (of routes) and attributes of what the kernel lists."""
    body = _header(family, table, 0, 0, 0)
    message = HEADER.pack(HEADER.size + len(body), asked, REQUEST | DUMP, 0, 0) + body
    with netlink.routes() as socket:
        socket.strict()
        try:
            answers = socket.ask(message)
        except DataplaneError as error:
            code = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
            if code in _NO_TABLE or (family is Family.IPV6 and code in _NO_FAMILY):
                return
            raise
    for one in answers:
        number, protocol = one[HEADER.size + 4], one[HEADER.size + 5]
        yield number, protocol, dict(attributes(one, HEADER.size + 12))
