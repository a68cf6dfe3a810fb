"""The fixed rules of IPVS mode: as many as there are, whatever the number of services.

Lives here: the chains, their rules, and where they are hooked in. Must not: know services, or run
iptables (backends/xtables.py does). docs/ipvs.md draws the path of a packet.

IPVS takes a packet that arrives in INPUT, after the filter table, and one of the node's own in
OUTPUT, after nat but before the filter table (ip_vs_core.c, 6.1: priorities 99 and -98). So what
keeps packets from it stands in mangle, and what refuses them in filter INPUT. The packet that IPVS
sends to an endpoint passes OUTPUT again and POSTROUTING, still with its mark.
"""

from collections.abc import Iterable
from hashlib import blake2b

from msgspec import Struct

from vipd.backends.ipvs.objects import (
    CLUSTER,
    DROPPED,
    FROM_NODE,
    GUARDED,
    HAIRPIN,
    INSIDE,
    MASQUERADED,
    REJECTED,
    RESTRICTED,
    SERVED,
    SOURCES,
    set_name,
)
from vipd.proxy.names import Family, family_of
from vipd.proxy.virtualserver import NodeNetwork

ADMIT, OUTSIDE, GUARD = "VIPD-IPVS-ADMIT", "VIPD-IPVS-OUTSIDE", "VIPD-IPVS-GUARD"
MARK, PODS, LEAVE = "VIPD-IPVS-MARK", "VIPD-IPVS-PODS", "VIPD-IPVS-POSTROUTING"
UNALLOCATED = "VIPD-IPVS-UNALLOCATED"
OUR_CHAINS = (ADMIT, OUTSIDE, GUARD, UNALLOCATED, MARK, PODS, LEAVE)
TABLES = ("mangle", "filter", "nat")
_NEW = "-m conntrack --ctstate NEW"
_MID_STREAM = "-p tcp ! --syn -j RETURN"


class Rule(Struct, frozen=True):
    """A rule; `why` is told to whoever lists the chain."""

    text: str
    why: str = ""

    @property
    def comment(self) -> str:
        """Return the comment it carries in the kernel: why, and the digest of its text."""
        digest = blake2b(self.text.encode(), digest_size=4).hexdigest()
        return f"{self.why} #{digest}".strip()

    def line(self, chain: str, verb: str = "-A") -> str:
        """Return the line of iptables-restore that adds it."""
        return f'{verb} {chain} -m comment --comment "{self.comment}" {self.text}'


class Chain(Struct, frozen=True):
    """A chain of ours and the built-in chains that it is reached from, each by one rule."""

    table: str
    name: str
    rules: tuple[Rule, ...]
    hooks: tuple[tuple[str, Rule], ...] = ()


def chains(family: Family, network: NodeNetwork, *, quiesced: bool = False) -> list[Chain]:
    """Return the chains of a family, each after those it jumps to.

    While the mode is quiesced another dataplane decides about new packets: only the guard of the
    addresses that are still local stays.
    """
    if quiesced:
        return [_guard(family, ())]
    return [
        _admit(family),
        _outside(family, network),
        _guard(family, sorted({port for _, port in network.health_ports})),
        _unallocated(family, network),
        *_marks(family, network),
    ]


def _matched(family: Family, name: str, sides: str, negated: str = "") -> str:
    return f"-m set {negated}--match-set {set_name(family, name)} {sides}"


def _admit(family: Family) -> Chain:
    restricted = _matched(family, RESTRICTED, "dst,dst")
    sources = _matched(family, SOURCES, "dst,dst,src", "! ")
    return Chain(
        "mangle",
        ADMIT,
        (
            Rule(_MID_STREAM, "a connection in mid-stream keeps its way"),
            Rule(f"{restricted} {sources} -j DROP", "loadBalancerSourceRanges"),
            Rule(f"{_matched(family, DROPPED, 'dst,dst')} -j DROP", "no endpoint on this node"),
        ),
        tuple((hook, Rule(f"{_NEW} -j {ADMIT}")) for hook in ("INPUT", "OUTPUT")),
    )


def _outside(family: Family, network: NodeNetwork) -> Chain:
    return Chain(
        "mangle",
        OUTSIDE,
        (
            Rule(_MID_STREAM),
            Rule(f"{_matched(family, INSIDE, 'dst,dst', '! ')} -j RETURN"),
            *(Rule(f"{one} -j RETURN", "own pods: any endpoint") for one in _pods(family, network)),
            Rule("-m addrtype --src-type LOCAL -j RETURN", "the node itself: too"),
            Rule("-j DROP", "no endpoint on this node"),
        ),
        (("INPUT", Rule(f"{_NEW} -j {OUTSIDE}")),),
    )


def _guard(family: Family, open_ports: Iterable[int]) -> Chain:
    icmp = "icmp-port-unreachable" if family is Family.IPV4 else "icmp6-port-unreachable"
    empty = _matched(family, REJECTED, "dst,dst")
    guarded = _matched(family, GUARDED, "dst")
    return Chain(
        "filter",
        GUARD,
        (
            Rule(_MID_STREAM),
            Rule(f"-p tcp {empty} -j REJECT --reject-with tcp-reset", "no endpoints"),
            Rule(f"{empty} -j REJECT --reject-with {icmp}", "no endpoints"),
            Rule(f"{_matched(family, SERVED, 'dst,dst')} -j RETURN"),
            Rule(f"-p tcp {guarded} -j REJECT --reject-with tcp-reset", "unknown port"),
            *(
                Rule(f"-p {one} {guarded} -j REJECT --reject-with {icmp}", "unknown port")
                for one in ("udp", "sctp")
            ),
            *(
                Rule(f"-p tcp -m tcp --dport {port} -j ACCEPT", "health checks from outside")
                for port in open_ports
            ),
        ),
        (("INPUT", Rule(f"{_NEW} -j {GUARD}", "host ports stay out of reach")),),
    )


def _unallocated(family: Family, network: NodeNetwork) -> Chain:
    ranges = [one for one in network.service_cidrs if family_of(one) is family]
    return Chain(
        "filter",
        UNALLOCATED,
        (
            Rule(_MID_STREAM),
            Rule(f"{_matched(family, GUARDED, 'dst')} -j RETURN"),
            *(Rule(f"-d {one} -j DROP", "no service has this address") for one in ranges),
        ),
        tuple((hook, Rule(f"{_NEW} -j {UNALLOCATED}")) for hook in ("FORWARD", "OUTPUT")),
    )


def _marks(family: Family, network: NodeNetwork) -> Iterable[Chain]:
    bit = f"{network.masquerade_mark:#x}"
    mark = f"-j MARK --set-xmark {bit}/{bit}"
    pods = _pods(family, network)
    rules = [
        Rule(_MID_STREAM, "a connection in mid-stream keeps its way"),
        Rule(f"{_matched(family, MASQUERADED, 'dst,dst')} {mark}", "external traffic: masquerade"),
        Rule(
            f"{_matched(family, FROM_NODE, 'dst,dst')} -m addrtype --src-type LOCAL {mark}",
            "policy Local, from the node itself: masquerade",
        ),
    ]
    if pods:
        rules.append(Rule(f"{_matched(family, CLUSTER, 'dst,dst')} -j {PODS}"))
        told = [*(Rule(f"{one} -j RETURN") for one in pods)]
        told.append(Rule(mark, "off-cluster source: masquerade"))
    else:  # the chain stays, so that no change of the network leaves one behind
        told = [Rule("-j RETURN", "pods cannot be told")]
    yield Chain("nat", PODS, tuple(told))
    yield Chain(
        "nat",
        MARK,
        tuple(rules),
        tuple((hook, Rule(f"-j {MARK}")) for hook in ("PREROUTING", "OUTPUT")),
    )
    masquerade = "-j MASQUERADE --random-fully"
    yield Chain(
        "nat",
        LEAVE,
        (
            Rule(
                f"{_matched(family, HAIRPIN, 'dst,dst,src')} {masquerade}",
                "an endpoint that reached itself",
            ),
            Rule(f"-m mark ! --mark {bit}/{bit} -j RETURN"),
            Rule(f"-j MARK --set-xmark 0x0/{bit}", "asked for by the mark, which is cleared"),
            Rule(masquerade),
        ),
        (("POSTROUTING", Rule(f"-j {LEAVE}")),),
    )


def _pods(family: Family, network: NodeNetwork) -> list[str]:
    """Return the matches for packets of pods; none where they cannot be told."""
    if network.pod_sources.interface:
        return [f"-i {network.pod_sources.interface.replace('*', '+')}"]
    return [f"-s {one}" for one in network.pod_sources.cidrs if family_of(one) is family]
