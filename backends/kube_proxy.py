"""What kube-proxy left in this network namespace, in any of its modes, and taking it away.

Lives here: the names that kube-proxy gives its objects, and their removal. Must not: touch anything
that is not on these lists: kubelet's chains (KUBE-FIREWALL, KUBE-KUBELET-CANARY), those of
kube-router (KUBE-ROUTER-…), other owners' virtual servers, ours.

The names are those of pkg/proxy/{iptables,nftables,ipvs} in Kubernetes 1.20 to 1.37. Two counters
of nfacct (1.32 and newer) stay: they cost nothing and their names do not say whose they are.
"""

import asyncio
import re
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec import Struct

from vipd.backends.ipset import LONGEST_NAME, IpSets
from vipd.backends.nftables.tool import Nft
from vipd.backends.xtables import Variant, Xtables, program
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, Rejected, Unsupported
from vipd.proxy.names import Address, Family, parse_address

if TYPE_CHECKING:
    from vipd.backends.ipvs.kernel import Kernel
    from vipd.backends.ipvs.objects import Manner, Service

SHARED = frozenset({"KUBE-MARK-MASQ", "KUBE-MARK-DROP"})
"""Chains that kubelet and the portmap plugin may use too; they stay while somebody does."""
CHAINS = {
    "mangle": frozenset({"KUBE-PROXY-CANARY"}),
    "filter": frozenset(
        {
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-FORWARD",
            "KUBE-NODEPORTS",
            "KUBE-PROXY-FIREWALL",
            "KUBE-PROXY-CANARY",
            "KUBE-NODE-PORT",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
        }
    ),
    "nat": SHARED
    | {
        "KUBE-SERVICES",
        "KUBE-NODEPORTS",
        "KUBE-POSTROUTING",
        "KUBE-PROXY-CANARY",
        "KUBE-NODE-PORT",
        "KUBE-LOAD-BALANCER",
    },
}
"""The chains that have a name of their own, of iptables and IPVS mode, by table."""
PER_SERVICE = re.compile(r"(KUBE-(?:SVC|SVL|EXT|FW|SEP|XLB)-)[A-Z2-7]{16}")
"""The chains of a service or endpoint, in nat: a prefix and 16 characters of base32."""
VIP_SETS = (
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-FW",
    "KUBE-LOAD-BALANCER-LOCAL",
    "KUBE-NODE-PORT-SCTP-HASH",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
)
"""Sets whose entries are the address, protocol and port of a virtual server."""
NODE_PORT_SETS = ("KUBE-NODE-PORT-TCP", "KUBE-NODE-PORT-UDP")
"""Sets of ports that are a virtual server on each address of the node."""
SETS = (
    *VIP_SETS,
    *NODE_PORT_SETS,
    "KUBE-NODE-PORT-LOCAL-TCP",
    "KUBE-NODE-PORT-LOCAL-UDP",
    "KUBE-LOOP-BACK",
    "KUBE-LOAD-BALANCER-SOURCE-IP",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-HEALTH-CHECK-NODE-PORT",
    "KUBE-IPVS-IPS",
)
DEVICE = "kube-ipvs0"
TABLE = "kube-proxy"
_ROUNDS, _PAUSE_SECONDS = 20, 0.05
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_TARGET = re.compile(r" -[jg] (\S+)")


class Outcome(Struct):
    """What was found, in words: what is removed or would be, and what stays and why."""

    removed: list[str] = []
    failed: list[str] = []

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note what goes wrong inside, and go on. A host that lacks the means has nothing there."""
        try:
            yield
        except Unsupported as error:
            if error.capability == "CAP_NET_ADMIN":
                raise
        except DataplaneError as error:
            self.failed.append(f"{what}: {error}")


class InTable(Struct, frozen=True):
    """kube-proxy's part of one table of iptables."""

    jumps: tuple[str, ...] = ()
    """Rules of built-in chains that lead to its chains, as `iptables-save` prints them."""
    chains: tuple[str, ...] = ()
    wanted_by: dict[str, tuple[str, ...]] = {}
    """Its chains that chains of others lead to, with those; they can be emptied only."""

    def script(self, table: str) -> str:
        """Return what `iptables-restore --noflush` is told, all of it at once or not."""
        kept = self.wanted_by
        lines = [f"-D{rule[2:]}" for rule in self.jumps]
        lines += [f"-F {chain}" for chain in (*self.chains, *kept)]
        lines += [f"-X {chain}" for chain in self.chains]
        return "\n".join((f"*{table}", *lines, "COMMIT", ""))

    def words(self, where: str) -> list[str]:
        """Return it in words, chains of services as a number for each kind."""
        kinds = Counter(found[1] for one in self.chains if (found := PER_SERVICE.fullmatch(one)))
        named = [one for one in self.chains if not PER_SERVICE.fullmatch(one)]
        return [
            *(f"{where} rule {rule[3:]}" for rule in self.jumps),
            *(f"{where} chain {name}" for name in named),
            *(f"{where} chains {prefix}… ({count})" for prefix, count in kinds.items()),
        ]


def in_table(table: str, saved: str) -> InTable:
    """Return kube-proxy's part of what `iptables-save` printed of a table."""
    ours: set[str] = set()
    built_in: set[str] = set()
    jumps: list[str] = []
    users: dict[str, dict[str, None]] = {}
    for line in saved.splitlines():
        if line.startswith(":"):
            name, policy = line[1:].split(" ")[:2]
            if policy != "-":
                built_in.add(name)
            elif name in CHAINS[table] or (table == "nat" and PER_SERVICE.fullmatch(name)):
                ours.add(name)
        elif line.startswith("-A "):
            chain = line.split(" ", 2)[1]
            if chain in ours or (found := _TARGET.search(_QUOTED.sub('""', line))) is None:
                continue
            if found[1] not in ours:
                continue
            if chain in built_in and found[1] not in SHARED:
                jumps.append(line)
            else:
                users.setdefault(found[1], {})[chain] = None
    wanted_by = {name: tuple(chains) for name, chains in users.items() if name not in SHARED}
    return InTable(tuple(jumps), tuple(sorted(ours - set(users))), wanted_by)


def set_name(family: Family, name: str) -> str:
    """Return the name that kube-proxy gives a set of a family."""
    if family is Family.IPV4:
        return name
    return f"KUBE-6-{name.removeprefix('KUBE-')}"[:LONGEST_NAME]


async def at_a_glance() -> tuple[str, ...]:
    """Return what says that kube-proxy is or was here, in words; `remove` finds all of it.

    A look at the rules that lead to its chains, its tables and its device. Loads nothing.
    """
    found: list[str] = []
    xtables = Xtables()
    for variant in Variant:
        for family in Family:
            if xtables.has(family, variant):
                where = f"{program(variant, family)} nat"
                left = in_table("nat", await xtables.save(family, "nat", variant))
                found += [f"{where} rule {rule[3:]}" for rule in left.jumps]
    outcome = Outcome()
    await _remove_tables(outcome, Nft(), dry_run=True)
    found += outcome.removed
    if _index() is not None:
        found.append(f"interface {DEVICE}")
    return tuple(found)


async def remove(*, dry_run: bool) -> Outcome:
    """Remove what kube-proxy left, or only say what that would be. Idempotent.

    Looking loads no table and no module.
    What cannot be removed is told, and the rest is. Raise Unsupported without CAP_NET_ADMIN. It
    does not stop kube-proxy, which puts everything back if it runs.
    """
    outcome = Outcome()
    xtables = Xtables()
    for variant in Variant:
        for family in Family:
            if xtables.has(family, variant):
                for table in CHAINS:
                    where = f"{program(variant, family)} {table}"
                    with outcome.attempt(where):
                        left = in_table(table, await xtables.save(family, table, variant))
                        if left != InTable():
                            if not dry_run:
                                text = left.script(table)
                                await xtables.restore(family, text, variant=variant)
                            _tell(outcome, left, where)
    sets = IpSets()
    there: list[str] = []
    with outcome.attempt("ipset"):
        names = await sets.names()
        there = [
            one for family in Family for name in SETS if (one := set_name(family, name)) in names
        ]
    # The sets and the device tell whose a virtual server is, so they go after it.
    with outcome.attempt("IPVS"):
        await _remove_ipvs(outcome, sets, there, dry_run=dry_run)
    await _destroy(outcome, sets, there, dry_run=dry_run)
    with outcome.attempt("nftables"):
        await _remove_tables(outcome, Nft(), dry_run=dry_run)
    return outcome


def _tell(outcome: Outcome, left: InTable, where: str) -> None:
    outcome.removed += left.words(where)
    outcome.failed += [
        f"{where} chain {name} stays, empty: rules of {', '.join(users)} lead to it"
        for name, users in left.wanted_by.items()
    ]


async def _destroy(outcome: Outcome, sets: IpSets, names: Sequence[str], *, dry_run: bool) -> None:
    """Remove sets; those that a rule uses are tried again for a second.

    iptables' nft variant returns before the kernel lets go of the rules (a work queue in
    net/netfilter/nf_tables_api.c frees them, and with them their use of a set).
    """
    busy: dict[str, Busy] = {}
    left = list(names)
    for attempt in range(_ROUNDS):
        if attempt:
            await asyncio.sleep(_PAUSE_SECONDS)
        busy = {}
        for name in left:
            with outcome.attempt(f"ipset {name}"):
                try:
                    if dry_run or await sets.destroy(name):
                        outcome.removed.append(f"ipset {name}")
                except Busy as error:
                    busy[name] = error
        left = list(busy)
        if not left:
            return
    outcome.failed += [f"ipset {name} stays: {error}" for name, error in busy.items()]


async def _remove_ipvs(
    outcome: Outcome, sets: IpSets, there: Sequence[str], *, dry_run: bool
) -> None:
    """Remove kube-proxy's virtual servers, then its device; never those of anybody else."""
    from vipd.backends.ipvs.kernel import LISTING, Kernel
    from vipd.backends.ipvs.objects import DELETE, Operation

    device = _index()
    addresses = set() if device is None else await _addresses(device)
    kernel = Kernel()
    # Asking for IPVS would load it.
    services = await _services(kernel, sets, there, addresses) if LISTING.exists() else {}
    refused = {}
    if not dry_run:
        operations = [Operation(DELETE, one, manner) for one, manner in services.items()]
        done = await asyncio.to_thread(kernel.ipvs, operations)
        refused = {operation.thing: error for operation, error in done.items()}
    outcome.removed += [f"virtual server {one}" for one in services if one not in refused]
    outcome.failed += [f"virtual server {one} stays: {why}" for one, why in refused.items()]
    if device is not None:
        if not dry_run:
            await _delete_device(device)
        outcome.removed.append(f"interface {DEVICE}")


async def _services(
    kernel: "Kernel", sets: IpSets, there: Sequence[str], bound: set[Address]
) -> "dict[Service, Manner]":
    """Return the virtual servers whose address is on the device or in one of the sets."""
    from vipd.backends.ipvs.objects import ROUTE_PROTOCOL, SERVED, member_text
    from vipd.backends.ipvs.objects import set_name as our_set_name
    from vipd.backends.local_routes import DNS_ROUTE_PROTOCOL, LocalRoutes

    listed = await asyncio.to_thread(kernel.services)
    local_routes = LocalRoutes(ROUTE_PROTOCOL)
    routes = await asyncio.to_thread(local_routes.listed) if listed else []
    own = (ROUTE_PROTOCOL, DNS_ROUTE_PROTOCOL)
    node = {one.address for one in routes if one.protocol not in own}
    places: set[str] = set()
    ours: set[str] = set()
    for family in Family:
        ours |= await sets.entries(our_set_name(family, SERVED)) or set()
        for name in VIP_SETS:
            if (full := set_name(family, name)) in there:
                places |= await sets.entries(full) or set()
        for name in NODE_PORT_SETS:
            if (full := set_name(family, name)) in there:
                protocol = name.rpartition("-")[2].lower()
                places |= {
                    f"{address},{protocol}:{port}"
                    for port in await sets.entries(full) or ()
                    for address in node
                    if address.version == family and not address.is_loopback
                }
    return {
        one: manner
        for one, manner in listed.items()
        if (text := member_text(one.address, one.protocol, one.port)) not in ours
        and (one.address in bound or text in places)
    }


def _index() -> int | None:
    try:
        return socket.if_nametoindex(DEVICE)
    except OSError:
        return None


async def _addresses(index: int) -> set[Address]:
    """Return the addresses on an interface. Raise Rejected where it is not a dummy."""
    from pyroute2 import AsyncIPRoute, NetlinkError

    try:
        async with AsyncIPRoute() as routes:
            (link,) = [one async for one in await routes.get_links(index)]
            if link.get(("linkinfo", "kind")) != "dummy":
                raise Rejected(f"interface {DEVICE}", "it is not a dummy, so not kube-proxy's")
            listed = [one async for one in await routes.get_addr(index=index)]
            return {address for one in listed if (address := parse_address(one.get("address", "")))}
    except NetlinkError as error:
        raise OutOfStep(f"interface {DEVICE}: {error}") from error


async def _delete_device(index: int) -> None:
    from pyroute2 import AsyncIPRoute, NetlinkError

    try:
        async with AsyncIPRoute() as routes:
            await routes.link("del", index=index)
    except NetlinkError as error:
        raise Rejected(f"ip link del {DEVICE}", str(error)) from error


async def _remove_tables(outcome: Outcome, nft: Nft, *, dry_run: bool) -> None:
    if nft.path is None:
        return
    there = await nft.tables()
    for word in ("ip", "ip6"):
        if (word, TABLE) in there:
            name = f"table {word} {TABLE}"
            with outcome.attempt(f"nft {name}"):
                if not dry_run:
                    await nft.run(["-f", "-"], f"delete {name}\n")
                outcome.removed.append(f"nft {name}")
