"""The fixed rules of userspace mode: what is kept from listeners, and from the node's own ports.

Lives here: the sets and chains of tables ``ip vipd-userspace`` and ``ip6 vipd-userspace``. They
filter and translate nothing. Must not: know services (compile.py) or run nft.

Service addresses are the node's own in this mode, so every program of the node that listens on all
addresses would be reached through them (kubernetes/kubernetes#72236): the guard refuses what no
service has. A packet that is to be dropped has to be dropped before a listener or the kernel
answers it, and a source that is not allowed before its connection is accepted.
"""

from vipd.backends.nftables.objects import (
    FAMILY_WORD,
    Chain,
    Container,
    Rule,
    declare,
    declare_chain,
)
from vipd.backends.nftables.pipeline import NOT_A_SYN, REFUSE, WORDS
from vipd.backends.userspace.objects import (
    ADDRESSES,
    ALLOWED,
    DROPPED,
    INSIDE,
    REFUSED,
    RESTRICTED,
    SERVED,
    TABLE,
)
from vipd.proxy.names import Family, Network, family_of
from vipd.proxy.virtualserver import NodeNetwork


def containers(family: Family) -> list[Container]:
    """Return the sets of a family's table."""
    w = WORDS[family]
    places = {
        name: Container("set", name, f"type {w.k_type};")
        for name in (SERVED, REFUSED, DROPPED, INSIDE, RESTRICTED)
    }
    return [
        Container("set", ADDRESSES, f"type {w.address_type};"),
        Container("set", ALLOWED, f"type {w.k_type} . {w.address_type}; flags interval;"),
        *places.values(),
    ]


def chains(family: Family, network: NodeNetwork) -> list[Chain]:
    """Return the chains of a family's table, each after those it goes to."""
    w = WORDS[family]
    keep = Rule(f"{NOT_A_SYN} return", "a connection in mid-stream keeps its way")
    arriving = (
        keep,
        Rule(f"{w.k} @{RESTRICTED} {w.k} . {w.saddr} != @{ALLOWED} drop", "source ranges"),
        Rule(f"{w.k} @{DROPPED} drop", "policy Local: no endpoint on this node"),
        Rule(f"{w.k} @{INSIDE} jump inside-only", "policy Local: for this cluster only"),
        Rule(f"{w.k} @{SERVED} return", "a worker listens"),
        Rule(f"{w.k} @{REFUSED} goto refuse", "no endpoint"),
        Rule(f"{w.daddr} @{ADDRESSES} goto refuse", "unknown port: not the node's own"),
    )
    passing = []
    unallocated = _listed([one for one in network.service_cidrs if family_of(one) is family])
    if unallocated:
        passing = [
            keep,
            Rule("fib daddr type local return", "this node has it"),
            Rule(f"{w.daddr} {unallocated} drop", "no service has this address"),
        ]
    hooks = [
        Chain(
            f"filter-{hook}",
            (Rule(f"ct state new goto {target}"),),
            f"type filter hook {hook} priority 0",
        )
        for hook, target in (("input", "arriving"), ("forward", "passing"), ("output", "passing"))
    ]
    return [
        Chain("refuse", REFUSE),
        Chain("inside-only", tuple(_inside(family, network))),
        Chain("arriving", arriving),
        Chain("passing", tuple(passing)),
        *hooks,
    ]


def commands(family: Family, network: NodeNetwork, *, whole: bool) -> list[str]:
    """Return the nft commands that make the fixed part; `whole`: the table is made anew."""
    word = FAMILY_WORD[family]
    lines = []
    if whole:
        lines += [f"add table {word} {TABLE}", f"delete table {word} {TABLE}"]
        lines.append(f"add table {word} {TABLE}")
        lines += [declare(family, one, TABLE) for one in containers(family)]
    for chain in chains(family, network):
        lines += declare_chain(family, chain, TABLE)
    return lines


def fixed(family: Family, network: NodeNetwork) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what is observed of the fixed part: the sets' comments, and each chain's rules."""
    sets = tuple(sorted(f"{one.name} {one.comment}" for one in containers(family)))
    rules = tuple(sorted(f"{one.name} {one.comments}" for one in chains(family, network)))
    return sets, rules


def _inside(family: Family, network: NodeNetwork) -> list[Rule]:
    w = WORDS[family]
    rules = [Rule("fib saddr type local return", "the node itself")]
    pods = _listed([one for one in network.pod_sources.cidrs if family_of(one) is family])
    if pods:
        rules.append(Rule(f"{w.saddr} {pods} return", "a pod"))
    if network.pod_sources.interface:
        rules.append(Rule(f'iifname "{network.pod_sources.interface}" return', "a pod"))
    return [*rules, Rule("drop")]


def _listed(networks: list[Network]) -> str:
    if len(networks) < 2:
        return str(networks[0]) if networks else ""
    return f"{{ {', '.join(map(str, networks))} }}"
