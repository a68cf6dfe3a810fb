"""From virtual servers to nftables objects: what each one puts into which map, and its own chains.

Lives here: the program and the pure function from one virtual server to its elements and chains.
Must not: compare programs (plan.py) or know constant chains beyond their names (pipeline.py).

A virtual server without state uses chains that it shares with all others of its shape. Round-robin
and affinity have state (a turn, a memory of clients), so such a service port has chains of its own,
and with affinity a map client → endpoint of its own. All virtual servers of a service port share
them, so that a client has one endpoint whatever address it uses.
"""

import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple

from immutables import Map
from msgspec import Struct

from vipd.backends.nftables.objects import Chain, Container, Element, Rule, digest
from vipd.backends.nftables.pipeline import (
    LOCAL_SLOTS,
    MOST_AFFINITIES,
    WORDS,
    classid,
    pick,
)
from vipd.backends.slots import assign, maglev
from vipd.proxy.model import Algorithm
from vipd.proxy.virtualserver import (
    Endpoint,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    Refusal,
    Use,
    VirtualServer,
)

IDENTITY = 0x80000000
"""Bit that tells an endpoint's identity from a slot number; bit 30 is set for the local list."""
_IDENTITIES = 1 << 30
_UNSAFE = re.compile(r"[^A-Za-z0-9./_-]")


class Entry(Struct, frozen=True):
    """A virtual server in the program, with the slots that history gave its endpoints."""

    virtual_server: VirtualServer
    cluster: tuple[Endpoint, ...]
    local: tuple[Endpoint, ...]


class Program(Struct, frozen=True):
    """What should be in the kernel. Immutable: a change shares the rest.

    `shared` counts how many virtual servers need an object that several can need: an element of
    cluster-ips or hairpin, or a chain or map of a service port's own.
    """

    network: NodeNetwork
    entries: Map[Key, Entry]
    shared: "Map[Shared, int]"
    shapes: frozenset[tuple[int, str]]
    """Chains of shapes in the kernel: (family, name), used or not; a full plan removes many idle
    ones."""


class Shared(NamedTuple):
    """An object that several virtual servers can need: an element, or an own chain or map."""

    family: int
    container: str
    """The set that holds the element; ``chain`` or ``map`` for an own object."""
    key: str


class Own(NamedTuple):
    """The chains and maps that belong to one service port."""

    chains: tuple[Chain, ...]
    maps: tuple[Container, ...]


NOTHING_OWN = Own((), ())


def entry(virtual_server: VirtualServer, before: Entry | None = None) -> Entry:
    """Return the entry of a virtual server; endpoints keep the slots they have in `before`."""

    def slots(held: tuple[Endpoint, ...], endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        if virtual_server.algorithm is Algorithm.MAGLEV:
            return maglev(endpoints)
        return assign(held, endpoints)

    return Entry(
        virtual_server,
        slots(before.cluster if before else (), virtual_server.cluster),
        slots(before.local if before else (), virtual_server.local),
    )


def elements(one: Entry) -> list[Element]:
    """Return every element that belongs to this virtual server alone, data before verdicts."""
    if one.virtual_server.affinity_seconds is not None:
        return other_elements(one)
    key = key_text(one.virtual_server.key)
    name = f"{prefix_of(one.virtual_server)}endpoints"
    targets = [
        Element(name, f"{key} . {classid(slot)}", _target(endpoint))
        for slot, endpoint in numbered(one)
    ]
    return targets + other_elements(one)


def numbered(one: Entry) -> Iterator[tuple[int, Endpoint]]:
    """Yield each slot with its endpoint, of both lists."""
    yield from enumerate(one.cluster, 1)
    yield from enumerate(one.local, LOCAL_SLOTS + 1)


def prefix_of(server: VirtualServer) -> str:
    """Return what the names of its containers begin with."""
    return "" if server.key.address is not None else "node-port-"


def other_elements(one: Entry) -> list[Element]:
    """Return its elements but for those that lead from a slot to an endpoint without affinity."""
    server = one.virtual_server
    key = key_text(server.key)
    prefix = prefix_of(server)
    made: list[Element] = []
    if server.affinity_seconds is not None:
        for first, slots in ((1, one.cluster), (LOCAL_SLOTS + 1, one.local)):
            made += _identified(f"{prefix}endpoint", key, first, slots)
    if server.masquerade is Masquerade.ALWAYS:
        made.append(Element(f"{prefix}masqueraded", key, ""))
    if server.use is Use.LOCAL_FROM_OUTSIDE and not prefix:
        # The address may be another service's cluster IP, on another port.
        made.append(Element("source-kept", key, ""))
    made += _verdicts(one, prefix, key)
    return made


def _identified(name: str, key: str, first: int, slots: tuple[Endpoint, ...]) -> Iterator[Element]:
    """Yield slot → identity → endpoint, the detour that lets affinity outlive a change of slots."""
    identity = identities(slots, local=first > LOCAL_SLOTS)
    for target, number in identity.items():
        yield Element(f"{name}s", f"{key} . {classid(number)}", target)
    for slot, endpoint in enumerate(slots, first):
        number = identity[_target(endpoint)]
        yield Element(f"{name}-ids", f"{key} . {classid(slot)}", classid(number))


def identities(slots: Iterable[Endpoint], *, local: bool) -> dict[str, int]:
    """Return a number for each distinct endpoint, derived from its address and port alone.

    The same endpoint has the same number after a restart and in every address of a service. Two
    that collide are told apart in sorted order.
    """
    base = IDENTITY | (1 << 30 if local else 0)
    taken: dict[int, str] = {}
    for text in sorted({_target(one) for one in slots}):
        number = int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")
        number %= _IDENTITIES - 1  # the last one would read "root" in a classid
        while base | number in taken:
            number = (number + 1) % (_IDENTITIES - 1)
        taken[base | number] = text
    return {text: number for number, text in taken.items()}


def _verdicts(one: Entry, prefix: str, key: str) -> Iterator[Element]:
    """Yield the elements that lead packets to the slots; they come last in a transaction."""
    server = one.virtual_server
    cluster = f"goto {chain_name(server, len(one.cluster), local=False)}" if one.cluster else ""
    local = f"goto {chain_name(server, len(one.local), local=True)}" if one.local else ""
    match server.use:
        case Use.CLUSTER:
            verdict = cluster
        case Use.LOCAL:
            verdict = local
        case Use.LOCAL_FROM_OUTSIDE:
            if cluster:
                yield Element(f"{prefix}cluster-policy", key, cluster)
            if local:
                yield Element(f"{prefix}local-policy", key, local)
            verdict = f"goto {prefix}from-outside" if cluster or local else ""
    reachable = local if server.use is not Use.CLUSTER else cluster
    if not reachable:
        refusal = "goto refuse" if server.when_empty is Refusal.REJECT else "drop"
        yield Element(f"{prefix}no-endpoints", key, refusal)
        # Not translated and not looked for among node ports: the filter hooks refuse it.
        verdict = verdict or "accept"
    if server.allowed_sources is not None:
        for source in server.allowed_sources:
            text = str(source.network_address if source.num_addresses == 1 else source)
            yield Element("allowed-sources", f"{key} . {text}", "")
        if verdict:
            yield Element("admitted", key, verdict)
        verdict = "goto check-source"
    if verdict:
        yield Element("services" if server.key.address is not None else "node-ports", key, verdict)


def shared(one: Entry) -> list[Shared]:
    """Return the objects that this virtual server shares with others."""
    server = one.virtual_server
    family = server.key.family
    made = []
    if server.kind is Kind.CLUSTER:
        made.append(Shared(family, "cluster-ips", str(server.key.address)))
    on_node = {end for end in (*one.cluster, *one.local) if end.local}
    for address, port in sorted({(end.address, end.port) for end in on_node}):
        protocol = server.key.protocol.lower()
        made.append(Shared(family, "hairpin", f"{address} . {address} . {protocol} . {port}"))
    if not has_own_chains(server):
        return made
    own = own_objects(one)
    made += [Shared(family, "chain", chain.name) for chain in own.chains]
    made += [Shared(family, "map", container.name) for container in own.maps]
    return made


def shapes(one: Entry) -> list[tuple[int, str]]:
    """Return the chains of shapes that this virtual server uses: (family, name)."""
    server = one.virtual_server
    if has_own_chains(server):
        return []
    return [
        (server.key.family, chain_name(server, len(slots), local=local))
        for slots, local in ((one.cluster, False), (one.local, True))
        if slots
    ]


def has_own_chains(server: VirtualServer) -> bool:
    """Return whether the virtual server has state, and so chains of its service port's own."""
    return server.affinity_seconds is not None or server.algorithm is Algorithm.ROUND_ROBIN


def _algorithm(server: VirtualServer) -> Algorithm:
    """Return the algorithm that stands for the wanted one: rules cannot count connections."""
    if server.algorithm is Algorithm.LEAST_CONNECTIONS:
        return Algorithm.RANDOM
    return server.algorithm


def chain_name(server: VirtualServer, count: int, *, local: bool) -> str:
    """Return the chain that picks among `count` slots of one of the two lists."""
    node_port = "node-port-" if server.key.address is None else ""
    policy = "local-" if local else ""
    if has_own_chains(server):
        return f"{node_port}{policy}{_own_name(server)}"
    return f"{node_port}{policy}{_algorithm(server)}-{count}"


def own_objects(one: Entry) -> Own:
    """Return the chains and maps of this virtual server's service port that it needs."""
    server = one.virtual_server
    if not has_own_chains(server):
        return NOTHING_OWN
    chains: list[Chain] = []
    maps: list[Container] = []
    for slots, local in ((one.cluster, False), (one.local, True)):
        if not slots:
            continue
        name = chain_name(server, len(slots), local=local)
        choice = pick(_algorithm(server), len(slots), local, server.key.family)
        if server.affinity_seconds is None:
            target = "translate" if server.key.address is not None else "node-port-translate"
            rules: tuple[Rule, ...] = (Rule(f"meta priority set {choice}"), Rule(f"goto {target}"))
        else:
            w = WORDS[server.key.family]
            spec = (
                f"type {w.address_type} : classid; flags dynamic,timeout; size {MOST_AFFINITIES};"
            )
            # A map that is there keeps its declaration, so another one has another name.
            memory = f"{'local-' if local else ''}clients-{digest(spec)}-{_own_name(server)}"
            maps.append(Container("map", memory, spec))
            rules = _remembering(server, memory, choice)
        chains.append(Chain(name, rules))
    return Own(tuple(chains), tuple(maps))


def _remembering(server: VirtualServer, memory: str, choice: str) -> tuple[Rule, ...]:
    """Return the rules that send a known client where it was, and remember the choice of a new one.

    The memory is refreshed by each new connection. An endpoint that is gone is missed by translate,
    which comes back, and another is chosen; an element has to go before it can hold another value.
    """
    w = WORDS[server.key.family]
    prefix = "" if server.key.address is not None else "node-port-"
    key = w.k if server.key.address is not None else w.n
    remember = (
        f"update @{memory} {{ {w.saddr} timeout {server.affinity_seconds}s : meta priority }}"
    )
    return (
        Rule("meta priority set none"),
        Rule(f"meta priority set {w.saddr} map @{memory}", "a known client"),
        Rule(f"meta priority != none {remember}"),
        Rule(f"meta priority != none jump {prefix}translate"),
        Rule(
            f"meta priority != none delete @{memory} {{ {w.saddr} : meta priority }}",
            "its endpoint is gone",
        ),
        Rule(f"meta priority set {choice}"),
        Rule(f"meta priority set {key} . meta priority map @{prefix}endpoint-ids"),
        Rule(remember),
        Rule(f"goto {prefix}translate"),
    )


def _own_name(server: VirtualServer) -> str:
    """Return a readable name that is unique for the service port.

    Only characters that need no quotes in nft text are kept: names come from strangers.
    """
    owner = server.owner
    text = f"{owner.service}/{owner.protocol.lower()}/{owner.port}".rstrip("/")
    identity = blake2b(f"{owner.protocol} {owner}".encode(), digest_size=8).hexdigest()
    return f"own-{identity}-{_UNSAFE.sub('_', text)}"[:100]


def key_text(key: Key) -> str:
    """Return K, or N for a node port, as nft prints it."""
    rest = f"{key.protocol.lower()} . {key.port}"
    return rest if key.address is None else f"{key.address} . {rest}"


def _target(endpoint: Endpoint) -> str:
    return f"{endpoint.address} . {endpoint.port}"
