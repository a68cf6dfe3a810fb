"""The constant part of the program: the jumps, chains and sets that every packet meets.

Lives here: everything whose number does not depend on services. Must not: know virtual servers
(compile.py). The page docs/iptables.md draws the path.

What is asked of a packet before its own chain (is it for a service at all, may this source, is it
masqueraded, is the server empty) is asked of sets, so each question is one rule for all services.
Sets of keys are ``hash:ip,port``. A node port has no address: its sets are ``hash:net,port``, where
the two halves of all addresses stand for any.
"""

from collections.abc import Sequence

from vipd.backends.iptables.balance import from_pods, mark
from vipd.backends.iptables.objects import (
    FILTER,
    GENERATION,
    GENERATION_MASK,
    NAT,
    Chain,
    Jump,
    Rule,
    SetKind,
    match_set,
)
from vipd.backends.xtables import PREFIX
from vipd.proxy.names import Family, Network, family_of
from vipd.proxy.virtualserver import NodeNetwork

SETS = {
    "HAIRPIN": SetKind("hash:ip,port,ip", "endpoints of this node, each with itself"),
    "SOURCES": SetKind("hash:ip,port,net", "sources that may use a virtual server"),
    "LIMITED": SetKind("hash:ip,port", "virtual servers that not everybody may use"),
    "MASQ-ALL": SetKind("hash:ip,port", "masqueraded whoever asks"),
    "MASQ-OUT": SetKind("hash:ip,port", "masqueraded unless a pod asks"),
    "NP-MASQ-ALL": SetKind("hash:net,port", "node ports that are masqueraded"),
    "REJECT": SetKind("hash:ip,port", "no endpoint anywhere: refused"),
    "DROP": SetKind("hash:ip,port", "no endpoint of this node: dropped"),
    "NP-REJECT": SetKind("hash:net,port", "node ports without endpoint: refused"),
    "NP-DROP": SetKind("hash:net,port", "node ports without local endpoint: dropped"),
    "SERVED": SetKind("hash:ip,port", "virtual servers that have endpoints"),
    "NP-SERVED": SetKind("hash:net,port", "node ports that have endpoints"),
    "CLUSTER-IPS": SetKind("hash:ip", "cluster IPs, whose other ports are refused"),
}
"""In the order in which entries are added; they are removed in the opposite one. The last three
come after the rules that they lead to, the others before."""
LIVE = ("SERVED", "NP-SERVED", "CLUSTER-IPS")
HALVES = {
    Family.IPV4: ("0.0.0.0/1", "128.0.0.0/1"),
    Family.IPV6: ("::/1", "8000::/1"),
}
LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}
WIDTH = {Family.IPV4: 32, Family.IPV6: 128}
SERVICES, DISPATCH, TREE = f"{PREFIX}SERVICES", f"{PREFIX}DISPATCH", f"{PREFIX}TREE"
NODE_PORTS, NODE_TREE = f"{PREFIX}NODEPORTS", f"{PREFIX}NODE-TREE"
OFF_CLUSTER, POSTROUTING = f"{PREFIX}OFF-CLUSTER", f"{PREFIX}POSTROUTING"
EXTERNAL, REFUSE, FORWARD = f"{PREFIX}EXTERNAL-SERVICES", f"{PREFIX}REJECT", f"{PREFIX}FORWARD"

NOT_A_SYN = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN"
INVALID = f"{PREFIX}INVALID"

NEW = "-m conntrack --ctstate NEW"
_NOT_PLACED = "-p tcp -m conntrack --ctstate INVALID"
_OURS = f"-m connmark --mark {GENERATION:#x}/{GENERATION_MASK:#x}"
_MARK_GENERATION = Rule("", f"-j CONNMARK --set-xmark {GENERATION:#x}/{GENERATION_MASK:#x}")
_TRANSLATED = Rule(f"{_OURS} -m conntrack --ctstate DNAT", "-j RETURN")
_KEEP = Rule(NOT_A_SYN, "-j RETURN")
_PORTALS = "kubernetes service portals"
_OUTSIDE = "outside of the window"

JUMPS = (
    Jump(NAT, "PREROUTING", "", SERVICES, _PORTALS),
    Jump(NAT, "OUTPUT", "", SERVICES, _PORTALS),
    Jump(NAT, "POSTROUTING", "", POSTROUTING, "kubernetes postrouting rules"),
    Jump(FILTER, "INPUT", NEW, EXTERNAL, "kubernetes externally-visible service portals"),
    Jump(FILTER, "FORWARD", "", FORWARD, "kubernetes forwarding rules"),
    Jump(FILTER, "FORWARD", NEW, SERVICES, _PORTALS),
    Jump(FILTER, "OUTPUT", NEW, SERVICES, _PORTALS),
    Jump(FILTER, "INPUT", _NOT_PLACED, INVALID, _OUTSIDE),
    Jump(FILTER, "FORWARD", _NOT_PLACED, INVALID, _OUTSIDE),
)
"""Each stands first in its chain; of two in one chain the later one comes first."""


def chains(table: str, network: NodeNetwork, family: Family) -> list[Chain]:
    """Return the constant chains of a table; the roots of the trees are not among them."""
    if table == NAT:
        return [
            _services(network, family),
            _dispatch(family, network),
            _off_cluster(network, family),
            _node_ports(family, network),
            _postrouting(family, network),
        ]
    return [
        Chain(
            REFUSE,
            (
                Rule("-p tcp", "-j REJECT --reject-with tcp-reset"),
                Rule("", f"-j REJECT --reject-with {_UNREACHABLE[family]}"),
            ),
            "no endpoints",
        ),
        _refusing(network, family),
        _refusing_arrivals(network, family),
        _forwarding(network),
        _invalid(network, family),
    ]


_UNREACHABLE = {Family.IPV4: "icmp-port-unreachable", Family.IPV6: "icmp6-port-unreachable"}


def node_port_matches(network: NodeNetwork, family: Family) -> list[str]:
    """Return the matches for own addresses that answer node ports, any of which has to hold.

    Loopback has to be left out before.
    """
    ranges = _of(network.node_port_ranges, family)
    local = "-m addrtype --dst-type LOCAL"
    if any(one.prefixlen == 0 for one in ranges):
        return [local]
    return [f"-d {one} {local}" for one in ranges]


def _services(network: NodeNetwork, family: Family) -> Chain:
    rules = [
        _KEEP,  # a connection in mid-stream keeps its way
        Rule(match_set("SERVED", family, "dst,dst"), f"-g {DISPATCH}"),
    ]
    own = node_port_matches(network, family)
    if own:
        rules.append(Rule(f"-d {LOOPBACK[family]}", "-j RETURN"))
        rules += [Rule(one, f"-g {NODE_PORTS}") for one in own]
    return Chain(SERVICES, tuple(rules), _PORTALS)


def _dispatch(family: Family, network: NodeNetwork) -> Chain:
    limited = match_set("LIMITED", family, "dst,dst")
    not_allowed = match_set("SOURCES", family, "dst,dst,src", negated=True)
    rules = (
        Rule(f"{limited} {not_allowed}", "-j RETURN"),
        Rule(match_set("MASQ-ALL", family, "dst,dst"), mark(network)),
        Rule(match_set("MASQ-OUT", family, "dst,dst"), f"-j {OFF_CLUSTER}"),
        _MARK_GENERATION,
        Rule("", f"-g {TREE}"),
    )
    return Chain(DISPATCH, rules, "what every virtual server asks")


def _off_cluster(network: NodeNetwork, family: Family) -> Chain:
    """Mark what no pod sends; where pods cannot be told, nobody."""
    pods = from_pods(network, family)
    if not pods:
        return Chain(OFF_CLUSTER, (Rule("", "-j RETURN"),), "pods cannot be told")
    rules = [Rule(one, "-j RETURN") for one in pods]
    return Chain(OFF_CLUSTER, (*rules, Rule("", mark(network))), "masquerade unless from a pod")


def _node_ports(family: Family, network: NodeNetwork) -> Chain:
    rules = (
        Rule(match_set("NP-SERVED", family, "dst,dst", negated=True), "-j RETURN"),
        # An address of this node with an empty virtual server: it is refused, not a node port.
        Rule(match_set("REJECT", family, "dst,dst"), "-j RETURN"),
        Rule(match_set("DROP", family, "dst,dst"), "-j RETURN"),
        Rule(match_set("NP-MASQ-ALL", family, "dst,dst"), mark(network)),
        _MARK_GENERATION,
        Rule("", f"-g {NODE_TREE}"),
    )
    return Chain(NODE_PORTS, rules, "kubernetes service nodeports")


def _postrouting(family: Family, network: NodeNetwork) -> Chain:
    bit = f"{network.masquerade_mark:#x}"
    rules = (
        Rule(
            f"-m conntrack --ctstate DNAT {match_set('HAIRPIN', family, 'dst,dst,src')}",
            "-j MASQUERADE --random-fully",
        ),
        Rule(f"-m mark ! --mark {bit}/{bit}", "-j RETURN"),
        # Cleared, so that a packet that comes by again is not masqueraded again.
        Rule("", f"-j MARK --set-xmark {bit}/0x0"),
        Rule("", "-j MASQUERADE --random-fully"),
    )
    return Chain(POSTROUTING, rules, "kubernetes service traffic requiring SNAT")


def _empty(family: Family) -> list[Rule]:
    limited = match_set("LIMITED", family, "dst,dst")
    not_allowed = match_set("SOURCES", family, "dst,dst,src", negated=True)
    return [
        _KEEP,
        Rule(f"{limited} {not_allowed}", "-j DROP"),
        Rule(match_set("REJECT", family, "dst,dst"), f"-g {REFUSE}"),
        Rule(match_set("DROP", family, "dst,dst"), "-j DROP"),
    ]


def _refusing(network: NodeNetwork, family: Family) -> Chain:
    """What passes or leaves untranslated: no endpoints, unknown port, unallocated address.

    Also what nobody knows of a TCP connection any more, `lost`: the client is told at once.
    """
    unallocated = [Rule(f"-d {one}", "-j DROP") for one in _of(network.service_cidrs, family)]
    unknown = Rule(match_set("CLUSTER-IPS", family, "dst"), f"-g {REFUSE}")
    lost = Rule(f"{NOT_A_SYN} {match_set('CLUSTER-IPS', family, 'dst')}", f"-g {REFUSE}")
    rules = (_TRANSLATED, lost, *_empty(family), unknown, *unallocated)
    return Chain(SERVICES, rules, _PORTALS)


def _refusing_arrivals(network: NodeNetwork, family: Family) -> Chain:
    """What arrives at this node untranslated: no endpoints, also of node ports; health checks."""
    rules = [_TRANSLATED, *_empty(family)]
    own = node_port_matches(network, family)
    if own:
        rules.append(Rule(f"-d {LOOPBACK[family]}", "-j RETURN"))
    for one in own:
        rules.append(Rule(f"{one} {match_set('NP-REJECT', family, 'dst,dst')}", f"-g {REFUSE}"))
        rules.append(Rule(f"{one} {match_set('NP-DROP', family, 'dst,dst')}", "-j DROP"))
    # As kube-proxy does, where the host's policy is to drop.
    rules += [
        Rule(f"-p tcp -m tcp --dport {port}", "-j ACCEPT")
        for port in sorted({port for _, port in network.health_ports})
    ]
    return Chain(EXTERNAL, tuple(rules), "kubernetes externally-visible service portals")


def _forwarding(network: NodeNetwork) -> Chain:
    """Let flows of services through where the host's policy is to drop, as kube-proxy does."""
    bit = f"{network.masquerade_mark:#x}"
    rules = (
        Rule(f"-m mark --mark {bit}/{bit}", "-j ACCEPT"),
        Rule(f"{_OURS} -m conntrack --ctstate RELATED,ESTABLISHED", "-j ACCEPT"),
    )
    return Chain(FORWARD, rules, "kubernetes forwarding rules")


def _invalid(network: NodeNetwork, family: Family) -> Chain:
    """Drop TCP packets of pods, and to them, that connection tracking cannot place.

    Nothing translates them back, so the client would meet them from an endpoint that it does not
    know, and reset a connection that is well (kubernetes/kubernetes#74839, #117924). What else the
    node forwards may come by one way and go by another (#94861): it is dropped only where pods
    cannot be told.
    """
    pods = [match for one in from_pods(network, family) for match in (one, _reversed(one))]
    matches = pods or ["-m addrtype ! --dst-type LOCAL"]
    rules = tuple(Rule(one, "-j DROP") for one in matches)
    return Chain(INVALID, rules, "would reset a connection that is well")


def _reversed(match: str) -> str:
    """Return the match for packets to pods from that for packets of pods."""
    return match.replace("-i ", "-o ", 1).replace("-s ", "-d ", 1)


def _of(networks: Sequence[Network], family: Family) -> list[Network]:
    return [one for one in networks if family_of(one) is family]
