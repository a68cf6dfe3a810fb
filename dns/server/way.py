"""The way of questions to the server: addresses that are the node's, and no connection tracking.

Lives here: local routes to the addresses that are only there for DNS, and the table that keeps its
traffic out of conntrack. Must not: decide where is answered. As NodeLocal DNSCache does it, but for
the dummy interface: a route with a protocol number of ours says whose it is.

Tracking costs DNS more than it gives: each question is an entry that stays for 30 s, and two
questions from one port at once race for one entry where they are translated, which loses one of
them. What is not tracked is not translated either: the service's own address is answered here.
"""

import asyncio
from collections.abc import Collection, Sequence

import structlog

from vipd.backends.ipvs.objects import ROUTE_PROTOCOL as IPVS_ROUTE_PROTOCOL
from vipd.backends.local_routes import DNS_ROUTE_PROTOCOL, LocalRoutes, Wanted, is_own
from vipd.backends.nftables.tool import Nft
from vipd.backends.userspace.objects import ROUTE_PROTOCOL as USERSPACE_ROUTE_PROTOCOL
from vipd.dns.settings import Listen
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import Address, Network

TABLE = "inet vipd-dns"
_PASSING_ROUTES = frozenset({DNS_ROUTE_PROTOCOL, IPVS_ROUTE_PROTOCOL, USERSPACE_ROUTE_PROTOCOL})
"""Protocol numbers of routes that go again: ours, and the modes', which go with a service."""

log = structlog.get_logger()


def belongs(address: Address, networks: Collection[Network]) -> bool:
    """Return whether an address is there for DNS only: IPv4 link-local, or a cluster IP.

    Any other has to be the node's already. One that is somebody else's would be cut off from here.
    """
    local = address.version == 4 and address.is_link_local
    return local or any(one.version == address.version and address in one for one in networks)


async def prepare(
    listens: Sequence[Listen],
    networks: Collection[Network],
    *,
    whole: bool = True,
    going: Collection[Listen] = (),
) -> None:
    """Make the addresses the node's, and keep DNS untracked; what was for others is taken away.

    Not `whole`: there may be more networks than are known yet, so no route is taken away. `going`
    are those of `listens` that no question shall come to any more, while replies still leave. What
    cannot be done is logged: the server works where the node brings the rest.
    """
    try:
        await asyncio.to_thread(_route, [one.address for one in listens], networks, whole)
    except DataplaneError as error:
        log.warning("DNS addresses are not added", why=str(error))
    nft = Nft()
    if nft.path is None:
        if listens:
            log.info("DNS is tracked by conntrack", why="nft is not there")
        return
    try:
        if listens:
            await nft.run(["-f", "-"], table(listens, going))
        else:
            await _remove_table(nft)
    except DataplaneError as error:
        log.warning("DNS is tracked by conntrack", why=str(error))


async def leftovers(*, remove: bool) -> list[str]:
    """Return what there is of ours, in words, and take it away where that is asked for.

    Raise DataplaneError.
    """
    nft = Nft()
    found = [f"table {TABLE}"] if nft.path is not None and await _has_table(nft) else []
    if found and remove:
        await _remove_table(nft)
    ours = await asyncio.to_thread(_ours)
    if remove:
        for error in (await asyncio.to_thread(_remove, ours)).values():
            raise error
    return found + [f"local route to {one}" for one in ours]


def elsewhere(listens: Collection[Listen]) -> list[Listen]:
    """Return the places whose address is not this node's: no question can come there. Blocks.

    Raise DataplaneError.
    """
    return [one for one in listens if not one.address.is_loopback and not is_own(one.address)]


async def is_untracked(listens: Sequence[Listen]) -> bool:
    """Return whether the table is there with all its rules and places, or must not be there.

    True where nft is not there. Raise DataplaneError.
    """
    nft = Nft()
    if nft.path is None:
        return True
    has_table = await _has_table(nft)
    if not listens or not has_table:
        return not listens and not has_table
    text = (await nft.run(["list", "table", *TABLE.split()])).decode(errors="replace")
    whole = text.count("notrack") == table(listens).count("notrack")
    return whole and all(f"{one.address} . {one.port}" in text for one in listens)


def table(listens: Sequence[Listen], going: Collection[Listen] = ()) -> str:
    """Return the table as nft reads it; it replaces what is there.

    What comes to one of `going` is tracked, so that it may be translated; what leaves it is not.
    """
    lines = [f"add table {TABLE}", f"delete table {TABLE}", f"add table {TABLE}"]
    for chain, hook in (("arriving", "prerouting"), ("leaving", "output")):
        lines.append(f"add chain {TABLE} {chain} {{ type filter hook {hook} priority raw; }}")
    for family, version in (("ip", 4), ("ip6", 6)):
        places = [one for one in dict.fromkeys(listens) if one.address.version == version]
        if not places:
            continue
        kind = "ipv4_addr" if version == 4 else "ipv6_addr"
        staying = [one for one in places if one not in going]
        for name, there in (("places", staying), ("sources", places)):
            lines.append(f"add set {TABLE} {family}-{name} {{ type {kind} . inet_service; }}")
            elements = ", ".join(f"{one.address} . {one.port}" for one in there)
            if there:
                lines.append(f"add element {TABLE} {family}-{name} {{ {elements} }}")
        for chain, end, name in (
            ("arriving", "d", "places"),
            ("leaving", "d", "places"),
            ("leaving", "s", "sources"),
        ):
            lines.append(
                f"add rule {TABLE} {chain} meta l4proto {{ tcp, udp }} "
                f"{family} {end}addr . th {end}port @{family}-{name} notrack"
            )
    return "".join(f"{line}\n" for line in lines)


async def _has_table(nft: Nft) -> bool:
    family, name = TABLE.split()
    return (family, name) in await nft.tables()


async def _remove_table(nft: Nft) -> None:
    if await _has_table(nft):
        await nft.run(["-f", "-"], f"delete table {TABLE}\n")


def _route(wanted: Sequence[Address], networks: Collection[Network], whole: bool) -> None:
    """Let there be routes to those of the addresses that are not the node's; `whole`: no others."""
    routes = LocalRoutes(DNS_ROUTE_PROTOCOL)
    there = routes.listed()
    ours = {one.address for one in there if one.protocol == DNS_ROUTE_PROTOCOL}
    others = {one.address for one in there if one.protocol not in _PASSING_ROUTES and one.is_local}
    needed = {one for one in wanted if belongs(one, networks) and one not in others}
    changes = [Wanted("add", one) for one in sorted(needed - ours, key=str)]
    if whole:
        changes += [Wanted("del", one) for one in sorted(ours - needed, key=str)]
    for error in routes.change(changes).values():
        raise error


def _ours() -> list[Address]:
    there = LocalRoutes(DNS_ROUTE_PROTOCOL).listed()
    return [one.address for one in there if one.protocol == DNS_ROUTE_PROTOCOL]


def _remove(ours: Sequence[Address]) -> dict[Wanted, DataplaneError]:
    return LocalRoutes(DNS_ROUTE_PROTOCOL).change([Wanted("del", one) for one in ours])
