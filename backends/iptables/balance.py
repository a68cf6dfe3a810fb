"""The chains of one service port: which endpoint a new connection goes to.

Lives here: the rules that choose and translate, for each algorithm, with and without affinity.
Must not: know how packets come here (dispatch.py, pipeline.py).

There is no chain for an endpoint: the rule that chooses it translates. VIPD-SVC-… chooses among the
cluster list, VIPD-SVL-… among the local one, VIPD-EXT-… between the two; the sixteen letters are
those of kube-proxy's chains for the same service port. A list that is long becomes a tree of
VIPD-SVP-… chains.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from math import gcd

from vipd.backends.iptables.objects import PROTOCOLS, Chain, Rule, hashed
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family, Network, ServicePortName, family_of
from vipd.proxy.virtualserver import Endpoint, NodeNetwork, Use, VirtualServer

AT_ONCE = 16
"""Rules that choose at random in one chain; with more endpoints there are chains below it."""
MOST_NODES = 32
"""What xt_cluster can divide sources among (XT_CLUSTER_NODES_MAX)."""
MOST_TURNS = 1024
"""Turns of one round of round-robin, each of them a rule; with more, chance decides."""
HASH_SEED = 0x76697064
"""Fixed, so that every node and every restart hashes a source alike ("vipd")."""
LONGEST_COMMENT = 200
"""Of 255 characters that a comment can have."""
_UNSAFE = re.compile(r"[^A-Za-z0-9/_.:-]")
FROM_NODE = "-m addrtype --src-type LOCAL"

Share = tuple[Endpoint, int]
"""An endpoint and its weight."""


def target(server: VirtualServer) -> str:
    """Return the chain that serves a virtual server; empty where it has no endpoint to go to."""
    if server.use is Use.CLUSTER:
        return cluster_chain(server) if server.cluster else ""
    if server.use is Use.LOCAL:
        return local_chain(server) if server.local else ""
    return hashed("EXT", _identity(server.owner)) if server.cluster or server.local else ""


def cluster_chain(server: VirtualServer) -> str:
    """Return the name of the chain that chooses among the cluster list."""
    return hashed("SVC", _identity(server.owner))


def local_chain(server: VirtualServer) -> str:
    """Return the name of the chain that chooses among the local list."""
    return hashed("SVL", _identity(server.owner))


def groups(server: VirtualServer, network: NodeNetwork) -> dict[str, list[Chain]]:
    """Return the chains that a virtual server needs, by the name that packets come to.

    Each group is a chain behind those it leads to. Other virtual servers of the same service port
    need the same ones.
    """
    made: dict[str, list[Chain]] = {}
    for name in names(server):
        if name == cluster_chain(server):
            made[name] = _choosing(server, name, server.cluster)
        elif name == local_chain(server):
            made[name] = _choosing(server, name, server.local)
        else:
            made[name] = [_from_outside(server, network)]
    return made


def names(server: VirtualServer) -> list[str]:
    """Return the names of the groups of chains that a virtual server needs."""
    made = []
    if server.use is not Use.LOCAL and server.cluster:
        made.append(cluster_chain(server))
    if server.use is not Use.CLUSTER and server.local:
        made.append(local_chain(server))
    if server.use is Use.LOCAL_FROM_OUTSIDE and made:
        made.append(target(server))
    return made


def chains(server: VirtualServer, network: NodeNetwork) -> list[Chain]:
    """Return all chains of all groups."""
    return [one for group in groups(server, network).values() for one in group]


def from_pods(network: NodeNetwork, family: Family) -> list[str]:
    """Return the matches for packets of pods, any of which has to hold; none: cannot be told."""
    if network.pod_sources.interface:
        return [f"-i {interface(network.pod_sources.interface)}"]
    return [f"-s {one}" for one in _of(network.pod_sources.cidrs, family)]


def interface(name: str) -> str:
    """Return an interface's name, or prefix that ends in ``*``, as iptables spells it."""
    return f"{name[:-1]}+" if name.endswith("*") else name


def mark(network: NodeNetwork) -> str:
    """Return the target that asks for masquerade."""
    bit = f"{network.masquerade_mark:#x}"
    return f"-j MARK --set-xmark {bit}/{bit}"


def shares(endpoints: Sequence[Endpoint]) -> list[Share]:
    """Return each endpoint with its weight, divided by the common divisor of all."""
    divisor = gcd(*(one.weight for one in endpoints)) or 1
    return [(one, one.weight // divisor) for one in endpoints]


def _from_outside(server: VirtualServer, network: NodeNetwork) -> Chain:
    """External traffic policy Local: any endpoint for pods and the node, else local ones."""
    rules = []
    if server.cluster:
        goto = f"-g {cluster_chain(server)}"
        rules += [Rule(one, goto) for one in from_pods(network, server.key.family)]
        rules += [Rule(FROM_NODE, mark(network)), Rule(FROM_NODE, goto)]
    if server.local:
        rules.append(Rule("", f"-g {local_chain(server)}"))
    return Chain(
        hashed("EXT", _identity(server.owner)), tuple(rules), f"{_name(server)} from outside"
    )


def _choosing(server: VirtualServer, name: str, endpoints: Sequence[Endpoint]) -> list[Chain]:
    word = PROTOCOLS[server.key.protocol]
    proto = f"-p {word}"
    owner = _identity(server.owner)
    remembered: list[Rule] = []
    if server.affinity_seconds is not None:
        mask = "255.255.255.255" if server.key.family is Family.IPV4 else "ffff:" * 7 + "ffff"
        for one in endpoints:
            match = (
                f"{proto} -m recent --update --seconds {server.affinity_seconds} --reap "
                f"--name {_memory(owner, one)} --mask {mask} --rsource"
            )
            remembered.append(Rule(match, _translation(one)))
        tails = [
            f" -m recent --set --name {_memory(owner, one)} --mask {mask} --rsource"
            for one in endpoints
        ]
    else:
        tails = [""] * len(endpoints)
    why = _name(server)
    weights = shares(endpoints)
    rest = [(one, weight, tail) for (one, weight), tail in zip(weights, tails, strict=True)]
    if server.algorithm is Algorithm.SOURCE_HASH:
        slots = [(one, 1, tail) for one, weight, tail in rest for _ in range(weight)]
        below, rules = _hashing(name, proto, slots, why, 0)
    elif server.algorithm is Algorithm.ROUND_ROBIN and sum(w for _, w in weights) <= MOST_TURNS:
        below, rules = [], _in_turn(proto, rest)
    else:
        below, rules = _by_chance(name, proto, rest, why)
    return [*below, Chain(name, (*remembered, *rules), why)]


Choice = tuple[Endpoint, int, str]
"""An endpoint, its weight, and what its rule has to match (so as to do) besides."""


def _by_chance(
    name: str, proto: str, choices: Sequence[Choice], why: str
) -> tuple[list[Chain], list[Rule]]:
    """Return rules that choose by weight: each takes its share of what those before it left."""
    left = sum(weight for _, weight, _ in choices)
    below: list[Chain] = []
    rules = []
    groups = [choices[at : at + 1] for at in range(len(choices))]
    if len(choices) > AT_ONCE:
        length = AT_ONCE
        while length * AT_ONCE < len(choices):
            length *= AT_ONCE
        groups = [choices[at : at + length] for at in range(0, len(choices), length)]
    for number, group in enumerate(groups):
        weight = sum(weight for _, weight, _ in group)
        chance = _chance(weight, left)
        left -= weight
        if len(group) == 1:
            one, _, tail = group[0]
            rules.append(Rule(f"{proto}{chance}{tail}", _translation(one)))
            continue
        sub = hashed("SVP", f"{name} {number}")
        more, inside = _by_chance(sub, proto, group, why)
        below += [*more, Chain(sub, tuple(inside), why)]
        rules.append(Rule(f"{proto}{chance}", f"-g {sub}"))
    return below, rules


def _in_turn(proto: str, choices: Sequence[Choice]) -> list[Rule]:
    """Return rules of which each takes one packet of as many as there are turns left.

    The counters stand at zero when a table is loaded, so each round goes through all of them.
    """
    turns: list[tuple[Endpoint, str]] = []
    most = max(weight for _, weight, _ in choices)
    for turn in range(most):
        turns += [(one, tail) for one, weight, tail in choices if turn < weight]
    rules = []
    for left, (one, tail) in zip(range(len(turns), 0, -1), turns, strict=True):
        every = f" -m statistic --mode nth --every {left} --packet 0" if left > 1 else ""
        rules.append(Rule(f"{proto}{every}{tail}", _translation(one)))
    return rules


def _hashing(
    name: str, proto: str, slots: Sequence[Choice], why: str, level: int
) -> tuple[list[Chain], list[Rule]]:
    """Return rules that choose a slot by the source address, each level by another hash."""
    below: list[Chain] = []
    rules = []
    seed = f"{HASH_SEED + level:#010x}"
    if len(slots) <= MOST_NODES:
        if len({(one.address, one.port) for one, _, _ in slots}) == 1:
            one, _, tail = slots[0]
            return below, [Rule(f"{proto}{tail}", _translation(one))]
        for slot, (one, _, tail) in enumerate(slots):
            match = f"{proto}{_of_hash(len(slots), slot, seed)}{tail}"
            rules.append(Rule(match, _translation(one)))
        return below, rules
    count = _groups(len(slots))
    for number in range(count):
        first, last = (len(slots) * at // count for at in (number, number + 1))
        sub = hashed("SVP", f"{name} {number}")
        more, inside = _hashing(sub, proto, slots[first:last], why, level + 1)
        below += [*more, Chain(sub, tuple(inside), why)]
        rules.append(Rule(f"{proto}{_of_hash(count, number, seed)}", f"-g {sub}"))
    return below, rules


def _groups(slots: int) -> int:
    """Return into how many groups slots are divided: equal ones if there can be, else large ones.

    Where they differ by a slot, shares differ by 3 % at most.
    """
    fewest = min(-(-slots // MOST_NODES), MOST_NODES)
    return next((one for one in range(fewest, MOST_NODES + 1) if slots % one == 0), fewest)


def _of_hash(total: int, node: int, seed: str) -> str:
    """Return the match for the sources of one node of `total`, counted from 0.

    One node and not a mask of several: iptables 1.8.9 takes no mask above 0x20 (it checks the
    value of --cluster-local-nodemask as if it were a node's number, libxt_cluster.c).
    """
    if total == 1:
        return ""
    return (
        f" -m cluster --cluster-total-nodes {total} --cluster-local-node {node + 1} "
        f"--cluster-hash-seed {seed}"
    )


@lru_cache(maxsize=1 << 12)
def _chance(weight: int, left: int) -> str:
    if weight == left:
        return ""
    # As the kernel keeps it, in units of 2**-31, and as it is printed.
    return f" -m statistic --mode random --probability {round(weight / left * 2**31) / 2**31:.11f}"


def _translation(one: Endpoint) -> str:
    return f"-j DNAT --to-destination {one}"


def _memory(owner: str, one: Endpoint) -> str:
    """Return the name of the list of an endpoint's clients, as kube-proxy calls its chain."""
    return hashed("SEP", f"{owner}{one}")


@lru_cache(maxsize=1 << 16)
def _identity(owner: ServicePortName) -> str:
    """Return what kube-proxy makes the sixteen letters of (servicePortChainName)."""
    return f"{owner}{owner.protocol.lower()}"


def _name(server: VirtualServer) -> str:
    """Return the service port for a comment; names come from strangers, so nothing is quoted."""
    return _UNSAFE.sub("_", str(server.owner))[:LONGEST_COMMENT]


def _of(networks: Sequence[Network], family: Family) -> list[Network]:
    return [one for one in networks if family_of(one) is family]
