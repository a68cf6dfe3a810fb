"""The constant part of the program: the containers and chains that every packet meets.

Lives here: all chains whose number does not depend on services, and the chains of a shape ("pick
one of five at random"), of which there is one for each shape in use. Must not: know virtual servers
(compile.py). The page docs/nftables.md draws the path.

Words: K is the key of a virtual server with an address (``daddr . l4proto . dport``), N that of a
node port (``l4proto . dport``). The slot travels from the chain that picks it to the one that
translates in ``meta priority`` (skb->priority), because nft 1.0.6 can neither declare a map key of
type integer nor add a rule to a ``typeof`` map in a later transaction ("conflicting protocols
specified: tcp vs. th"). Postrouting clears it again, so that no qdisc takes it for a class.
Slots 0:1… are the cluster list, 1:1… the local list, 8000:0 and up are endpoints by identity.
"""

from collections.abc import Iterable

from vipd.backends.nftables.objects import FAMILY_WORD, Chain, Container, Rule
from vipd.proxy.names import Family, Network, family_of
from vipd.proxy.virtualserver import NodeNetwork

NOT_A_SYN = "meta l4proto tcp tcp flags & (fin | syn | rst | ack) != syn"
PORTS = "meta l4proto { tcp, udp, sctp }"
GENERATION = "0x4e000000"
GENERATION_MASK = "0xff000000"
MARK_GENERATION = f"ct mark set ct mark and 0x00ffffff or {GENERATION}"
"""Flows that this program translates carry 0x4e ("N") in the top byte of the connection mark, so
that a drain can see them. The lower bytes belong to others."""
HASH_SEED = "0x76697064"
"""Fixed, so that every node and every restart hashes a source alike ("vipd")."""
LOCAL_SLOTS = 0x10000
"""Offset of the local list's slots."""
MOST_AFFINITIES = 65536
"""Clients remembered for each service port with affinity; more are served without memory."""

# A reset, not ICMP, for TCP: the kernel limits ICMP errors to one a second for each client after a
# burst of six, and a client whose connect() still holds the socket ignores one (tcp_v6_err() in
# net/ipv6/tcp_ipv6.c, 6.18: ECONNREFUSED only after the first retransmission, 1 s later).
REFUSE = (Rule("meta l4proto tcp reject with tcp reset"), Rule("reject"))
REFUSING = REFUSE_PASSING, REFUSE_ARRIVING = "refuse-passing", "refuse-arriving"
"""Chains that refuse what has not been translated by then."""

LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1"}
ADDRESS_TYPE = {Family.IPV4: "ipv4_addr", Family.IPV6: "ipv6_addr"}


class Words:
    """The spellings that differ between the two families, and between K and N."""

    def __init__(self, family: Family) -> None:
        self.ip = FAMILY_WORD[family]
        self.saddr = f"{self.ip} saddr"
        self.daddr = f"{self.ip} daddr"
        self.n = "meta l4proto . th dport"
        self.k = f"{self.daddr} . {self.n}"
        self.address_type = ADDRESS_TYPE[family]
        self.n_type = "inet_proto . inet_service"
        self.k_type = f"{self.address_type} . {self.n_type}"


WORDS = {family: Words(family) for family in Family}


def containers(family: Family) -> list[Container]:
    """Return every set and map of a family's table, in the order they have to be declared."""
    w = WORDS[family]
    endpoint_type = f"{w.address_type} . inet_service"

    def verdicts(name: str, key: str, beside: str = "") -> Container:
        return Container("map", name, f"type {key} : verdict; counter;", beside)

    # The hook of a base chain that is there cannot be changed: another one means another table.
    hooks = " ".join(chain.name + chain.hook for chain in chains(family, NodeNetwork()))

    made = [
        Container("set", "cluster-ips", f"type {w.address_type};"),
        Container("set", "source-kept", f"type {w.k_type};"),
        Container("set", "hairpin", f"type {w.address_type} . {w.address_type} . {w.n_type};"),
        Container("set", "allowed-sources", f"type {w.k_type} . {w.address_type}; flags interval;"),
        verdicts("services", w.k_type, hooks),
        verdicts("admitted", w.k_type),
    ]
    for prefix, key in (("", w.k_type), ("node-port-", w.n_type)):
        made += [
            Container("set", f"{prefix}masqueraded", f"type {key};"),
            verdicts(f"{prefix}cluster-policy", key),
            verdicts(f"{prefix}local-policy", key),
            verdicts(f"{prefix}no-endpoints", key),
            Container(
                "map", f"{prefix}endpoints", f"type {key} . classid : {endpoint_type}; counter;"
            ),
            Container("map", f"{prefix}endpoint-ids", f"type {key} . classid : classid;"),
        ]
    made.append(verdicts("node-ports", w.n_type))
    return made


def chains(family: Family, network: NodeNetwork) -> list[Chain]:
    """Return the constant chains of a family, each after those it jumps to."""
    return [
        *_translating(family),
        *_local_policy(family, network),
        *_dispatch(family, network),
        *_refusing(family, network),
        _masquerading(family, network),
    ]


def skeleton() -> Chain:
    """Return the one chain of the skeleton table, the same for both families.

    A nat base chain with a ct expression: as long as it is there, NAT hooks and connection tracking
    stay on whatever else comes and goes (measured on 6.1 and 6.18). It matches nothing on purpose.
    """
    rule = Rule("ct mark 0x7fffffff counter", "keeps NAT and connection tracking on")
    return Chain("pre", (rule,), "type nat hook prerouting priority -90")


def shape_chain(name: str, family: Family) -> Chain:
    """Return the chain of a shape from its name, such as ``node-port-local-random-5``.

    It picks a slot and goes on to translate. Raise ValueError for a name that is no shape's.
    """
    rest = name.removeprefix("node-port-")
    prefix = "node-port-" if rest != name else ""
    policy = rest.removeprefix("local-")
    local = policy != rest
    algorithm, _, count = policy.rpartition("-")
    if algorithm not in ("random", "source-hash", "maglev") or not count.isdecimal():
        raise ValueError(name)
    return Chain(
        name,
        (
            Rule(f"meta priority set {pick(algorithm, int(count), local, family)}"),
            Rule(f"goto {prefix}translate"),
        ),
    )


def pick(algorithm: str, count: int, local: bool, family: Family) -> str:
    """Return the expression that chooses one of `count` slots of the cluster or the local list."""
    saddr = WORDS[family].saddr
    offset = (LOCAL_SLOTS if local else 0) + 1
    if count == 1:
        return classid(offset)
    match algorithm:
        case "random":
            return f"numgen random mod {count} offset {offset}"
        case "round-robin":
            return f"numgen inc mod {count} offset {offset}"
        case "source-hash":
            return f"jhash {saddr} mod {count} seed {HASH_SEED} offset {offset}"
        case "maglev":
            return f"jhash {saddr} . th sport mod {count} seed {HASH_SEED} offset {offset}"
        case _:
            raise ValueError(algorithm)


def classid(number: int) -> str:
    """Return a number as nft reads and prints a value of type classid: two hexadecimal halves."""
    return f"{number >> 16:x}:{number & 0xFFFF:x}"


def networks(wanted: Iterable[Network], family: Family) -> str:
    """Return an anonymous set of the networks of a family; empty where there are none."""
    texts = [str(one) for one in wanted if family_of(one) is family]
    return f"{{ {', '.join(texts)} }}" if texts else ""


def from_pod(family: Family, network: NodeNetwork) -> str:
    """Return the match for packets of pods, or an empty text where pods cannot be told."""
    if network.pod_sources.interface:
        return f'iifname "{network.pod_sources.interface}"'
    cidrs = networks(network.pod_sources.cidrs, family)
    return f"{WORDS[family].saddr} {cidrs}" if cidrs else ""


def _to_pod(family: Family, network: NodeNetwork) -> str:
    """Return the match for packets to pods, or an empty text where pods cannot be told."""
    if network.pod_sources.interface:
        return f'oifname "{network.pod_sources.interface}"'
    cidrs = networks(network.pod_sources.cidrs, family)
    return f"{WORDS[family].daddr} {cidrs}" if cidrs else ""


def _not_from_pod(family: Family, network: NodeNetwork) -> str:
    """Return the opposite. Packets of the node itself have no interface: they are not pods'."""
    if network.pod_sources.interface:
        return f'iifname != "{network.pod_sources.interface}"'
    cidrs = networks(network.pod_sources.cidrs, family)
    return f"{WORDS[family].saddr} != {cidrs}" if cidrs else ""


def _translating(family: Family) -> list[Chain]:
    w = WORDS[family]
    return [
        Chain(
            f"{prefix}translate",
            (
                Rule(MARK_GENERATION, "flows of this dataplane can be told"),
                Rule(f"{PORTS} dnat {w.ip} to {key} . meta priority map @{prefix}endpoints"),
            ),
        )
        for prefix, key in (("", w.k), ("node-port-", w.n))
    ]


def _local_policy(family: Family, network: NodeNetwork) -> list[Chain]:
    """External traffic policy Local: any endpoint for pods and the node, else local ones."""
    w = WORDS[family]
    made = []
    mark = f"meta mark set meta mark or {network.masquerade_mark:#x}"
    for prefix, key in (("", w.k), ("node-port-", w.n)):
        rules = []
        pods = from_pod(family, network)
        if pods:
            rules.append(
                Rule(f"{pods} {key} vmap @{prefix}cluster-policy", "own pods: any endpoint")
            )
        rules += [
            Rule(f"fib saddr type local {mark}"),
            Rule(
                f"fib saddr type local {key} vmap @{prefix}cluster-policy", "the node itself: too"
            ),
            Rule(f"{key} vmap @{prefix}local-policy", "others: endpoints of this node"),
        ]
        made.append(Chain(f"{prefix}from-outside", tuple(rules)))
    return made


def _dispatch(family: Family, network: NodeNetwork) -> list[Chain]:
    w = WORDS[family]
    mark = f"meta mark set meta mark or {network.masquerade_mark:#x}"
    node_port = Chain(
        "node-port",
        (
            Rule(f"{w.n} @node-port-masqueraded {mark}"),
            Rule(f"{w.n} vmap @node-ports"),
        ),
    )
    check_sources = Chain(
        "check-source",
        (
            Rule(f"{w.k} . {w.saddr} != @allowed-sources drop", "loadBalancerSourceRanges"),
            Rule(f"{w.k} vmap @admitted"),
        ),
    )
    rules = [Rule(f"{NOT_A_SYN} accept", "a connection in mid-stream keeps its way")]
    outsiders = _not_from_pod(family, network)
    if outsiders:
        rules.append(
            Rule(
                f"{w.daddr} @cluster-ips {w.k} != @source-kept {outsiders} {mark}",
                "off-cluster source: masquerade",
            )
        )
    rules += [
        Rule(f"{w.k} @masqueraded {mark}", "external traffic: masquerade"),
        Rule(f"{w.k} vmap @services"),
    ]
    own = _node_port_match(family, network)
    if own:
        rules.append(Rule(f"{own} goto node-port", "own addresses, never loopback"))
    dispatch = Chain("dispatch", tuple(rules))
    hooks = [
        Chain(f"nat-{hook}", (Rule("goto dispatch"),), f"type nat hook {hook} priority -100")
        for hook in ("prerouting", "output")
    ]
    return [node_port, check_sources, dispatch, *hooks]


def _node_port_match(family: Family, network: NodeNetwork) -> str:
    """Return the match for addresses of this node that answer node ports, or an empty text."""
    w = WORDS[family]
    ranges = [one for one in network.node_port_ranges if family_of(one) is family]
    if not ranges:
        return ""
    inside = "" if any(one.prefixlen == 0 for one in ranges) else networks(ranges, family)
    within = f" {w.daddr} {inside}" if inside else ""
    return f"fib daddr type local{within} {w.daddr} != {LOOPBACK[family]}"


def _refusing(family: Family, network: NodeNetwork) -> list[Chain]:
    """What is left untranslated: no endpoints, unknown port, unallocated address."""
    w = WORDS[family]
    no_endpoints = Rule(f"{w.k} vmap @no-endpoints")
    lost = Rule(
        f"{NOT_A_SYN} {w.daddr} @cluster-ips goto refuse", "a connection that nobody knows: reset"
    )
    keep = Rule(f"{NOT_A_SYN} return", "a connection in mid-stream keeps its way")
    translated = Rule(
        f"ct mark and {GENERATION_MASK} == {GENERATION} ct status dnat return",
        "goes to an endpoint",
    )
    passing = [
        translated,
        lost,
        keep,
        no_endpoints,
        Rule(f"{w.daddr} @cluster-ips goto refuse", "unknown port"),
    ]
    unallocated = networks(network.service_cidrs, family)
    if unallocated:
        passing.append(Rule(f"{w.daddr} {unallocated} drop", "no service has this address"))
    arriving = [translated, keep, no_endpoints]
    own = _node_port_match(family, network)
    if own:
        arriving.append(Rule(f"{own} {w.n} vmap @node-port-no-endpoints"))
    refuse = [
        Chain("refuse", REFUSE),
        Chain(REFUSE_PASSING, tuple(passing)),
        Chain(REFUSE_ARRIVING, tuple(arriving)),
    ]
    hooks = [
        Chain(
            f"filter-{hook}",
            (*_invalid(hook, family, network), Rule(f"ct state new goto {target}")),
            f"type filter hook {hook} priority 0",
        )
        for hook, target in (
            ("input", REFUSE_ARRIVING),
            ("forward", REFUSE_PASSING),
            ("output", REFUSE_PASSING),
        )
    ]
    return [*refuse, *hooks]


def _invalid(hook: str, family: Family, network: NodeNetwork) -> list[Rule]:
    """Drop TCP packets that connection tracking cannot place, such as those outside of the window.

    Nothing translates them back, so the client would meet them from an endpoint that it does not
    know, and reset a connection that is well (kubernetes/kubernetes#74839, #117924). Only those of
    pods, where they can be told: what else the node forwards may come by one way and go by another
    (#94861).
    """
    from_pods, to_pods = from_pod(family, network), _to_pod(family, network)
    wanted = {
        "forward": [from_pods, to_pods] if from_pods else [""],
        "input": [from_pods] if from_pods else [],
    }
    match = "ct state invalid meta l4proto tcp"
    return [
        Rule(" ".join(filter(None, (match, one, "drop"))), "would reset a connection that is well")
        for one in wanted.get(hook, ())
    ]


def _masquerading(family: Family, network: NodeNetwork) -> Chain:
    w = WORDS[family]
    mark = f"{network.masquerade_mark:#x}"
    return Chain(
        "nat-postrouting",
        (
            Rule(
                f"ct mark and {GENERATION_MASK} == {GENERATION} ct status dnat "
                "meta priority set none",
                "the slot is not for qdiscs",
            ),
            Rule(
                f"meta mark and {mark} == {mark} meta mark set meta mark xor {mark} "
                "masquerade fully-random",
                "asked for by the mark, which is cleared",
            ),
            Rule(
                f"ct status dnat {w.saddr} . {w.daddr} . {w.n} @hairpin masquerade fully-random",
                "an endpoint that reached itself",
            ),
        ),
        "type nat hook postrouting priority 100",
    )
