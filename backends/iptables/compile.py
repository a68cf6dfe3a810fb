"""From virtual servers to iptables objects: what each one puts into which set, chain and tree.

Lives here: the program, and what one virtual server needs. Must not: compare programs (plan.py) or
know constant chains beyond their names (pipeline.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from immutables import Map
from msgspec import Struct

from vipd.backends.iptables import balance, dispatch
from vipd.backends.iptables.dispatch import EMPTY, Leaf, Node
from vipd.backends.iptables.objects import NAT, PROTOCOLS, Chain, Element
from vipd.backends.iptables.pipeline import HALVES, NODE_TREE, TREE, WIDTH, chains
from vipd.proxy.names import Family, Network
from vipd.proxy.virtualserver import (
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    Refusal,
    Use,
    VirtualServer,
)

CHAIN = ""


class Shared(NamedTuple):
    """A thing that several virtual servers can need: an entry of a set, or a group of chains."""

    family: int
    set: str
    """Name of the set; CHAIN for chains."""
    text: str


class Trees(Struct, frozen=True):
    """The dispatch of a family: by address, and of node ports."""

    addresses: Node = EMPTY
    node_ports: Node = EMPTY


class Program(Struct, frozen=True):
    """What should be in the kernel. Immutable: a change shares the rest.

    `shared` counts how many virtual servers need a thing that more than one needs; who needs a
    thing alone is not in it.
    """

    network: NodeNetwork
    servers: Map[Key, VirtualServer]
    shared: Map[Shared, int]
    trees: Map[Family, Trees]


NOTHING = Program(NodeNetwork(), Map(), Map(), Map({family: Trees() for family in Family}))


def program(servers: Iterable[VirtualServer], network: NodeNetwork) -> Program:
    """Return the program that serves these virtual servers."""
    held = {one.key: one for one in servers}
    counts: dict[Shared, int] = {}
    leaves: dict[tuple[Family, bool], list[Leaf]] = {}
    for key, one in held.items():
        for thing in shared(one):
            counts[thing] = counts.get(thing, 0) + 1
        target = balance.target(one)
        if target:
            place = key.family, key.address is None
            leaves.setdefault(place, []).append(dispatch.leaf(key, target))
    trees = {
        family: Trees(
            dispatch.build(leaves.get((family, False), ())),
            dispatch.build(leaves.get((family, True), ())),
        )
        for family in Family
    }
    return Program(network, Map(held), Map(counts), Map(trees))


def changed(
    before: Program, servers: Mapping[Key, VirtualServer | None], network: NodeNetwork | None = None
) -> Program:
    """Return the program with virtual servers replaced, or gone where None. O(change)."""
    held = before.servers.mutate()
    counts = before.shared.mutate()
    trees = dict(before.trees)
    for key, now in servers.items():
        was = held.get(key)
        for thing, step in (
            *((one, +1) for one in (shared(now) if now else ())),
            *((one, -1) for one in (shared(was) if was else ())),
        ):
            count = counts.get(thing, 0) + step
            if count:
                counts[thing] = count
            else:
                counts.pop(thing, None)
        if now is None:
            held.pop(key, None)
        else:
            held[key] = now
        target, old = (balance.target(one) if one else "" for one in (now, was))
        if target != old:
            trees[key.family] = _with_target(trees[key.family], key, target)
    return Program(network or before.network, held.finish(), counts.finish(), Map(trees))


def _with_target(trees: Trees, key: Key, target: str) -> Trees:
    node = trees.node_ports if key.address is None else trees.addresses
    one = dispatch.leaf(key, target)
    node = dispatch.with_leaf(node, one) if target else dispatch.without_key(node, one.bits)
    if key.address is None:
        return Trees(trees.addresses, node)
    return Trees(node, trees.node_ports)


def own_elements(server: VirtualServer) -> Iterator[Element]:
    """Yield the entries of sets that belong to this virtual server alone."""
    key = server.key
    port = f"{PROTOCOLS[key.protocol]}:{key.port}"
    prefix = "NP-" if key.address is None else ""
    places = HALVES[key.family] if key.address is None else (str(key.address),)
    sets = []
    if balance.target(server):
        sets.append("SERVED")
    if server.masquerade is Masquerade.ALWAYS:
        sets.append("MASQ-ALL")
    if not (server.local if server.use is not Use.CLUSTER else server.cluster):
        sets.append("REJECT" if server.when_empty is Refusal.REJECT else "DROP")
    for name in sets:
        yield from (Element(f"{prefix}{name}", f"{place},{port}") for place in places)
    if key.address is None:
        return
    place = f"{key.address},{port}"
    if server.masquerade is Masquerade.OFF_CLUSTER:
        yield Element("MASQ-OUT", place)
    if server.allowed_sources is not None:
        yield Element("LIMITED", place)
        for source in server.allowed_sources:
            yield from (Element("SOURCES", f"{place},{one}") for one in _sources(source))


def shared(server: VirtualServer) -> list[Shared]:
    """Return the things that this virtual server needs and others can need too."""
    family = server.key.family
    made = []
    if server.kind is Kind.CLUSTER:
        made.append(Shared(family, "CLUSTER-IPS", str(server.key.address)))
    protocol = PROTOCOLS[server.key.protocol]
    on_node = {(one.address, one.port) for one in (*server.cluster, *server.local) if one.local}
    made += [
        Shared(family, "HAIRPIN", f"{address},{protocol}:{port},{address}")
        for address, port in sorted(on_node)
    ]
    made += [Shared(family, CHAIN, one) for one in balance.names(server)]
    return made


def elements(wanted: Program) -> dict[tuple[Family, str], set[str]]:
    """Return the entries of every set, by family and name."""
    found: dict[tuple[Family, str], set[str]] = {}
    for key, server in wanted.servers.items():
        for name, text in own_elements(server):
            found.setdefault((key.family, name), set()).add(text)
    for family, name, text in wanted.shared:
        if name != CHAIN:
            found.setdefault((Family(family), name), set()).add(text)
    return found


def all_chains(wanted: Program, family: Family, table: str) -> dict[str, Chain]:
    """Return every chain of a table by name."""
    found = {one.name: one for one in chains(table, wanted.network, family)}
    if table != NAT:
        return found
    for server in wanted.servers.values():
        if server.key.family is family and any(name not in found for name in balance.names(server)):
            found |= {one.name: one for one in balance.chains(server, wanted.network)}
    for node, root, width in roots(wanted.trees[family], family):
        found |= {one.name: one for one in dispatch.chains(node, root, width)}
    return found


def roots(trees: Trees, family: Family) -> tuple[tuple[Node, str, int], ...]:
    """Return both trees of a family, each with the name of its first chain and its width."""
    return (trees.addresses, TREE, WIDTH[family]), (trees.node_ports, NODE_TREE, 0)


@lru_cache(maxsize=1 << 10)
def _sources(source: Network) -> tuple[str, ...]:
    """Return a range as ipset prints it. A set of networks cannot hold a prefix of no bits."""
    if not source.prefixlen:
        return tuple(str(half) for half in source.subnets())
    whole = source.prefixlen == source.max_prefixlen
    return (str(source.network_address if whole else source),)
