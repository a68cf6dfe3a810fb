"""The return path of transparent connections: what brings an endpoint's answers to the worker.

Lives here: the rule that marks them, the policy rule and the route for what is marked, as text.
Pure. Must not: run nft or talk to the kernel (policy_routing.py).

An endpoint answers to the client's address. What passes this node and belongs to a transparent
socket of it is marked before it is routed, and what is marked is routed to the node itself. ICMP is
marked as well: errors of the endpoint are for the socket. A socket that is bound to no address is
somebody else's, who takes packets for any destination (``socket wildcard``).
"""

from typing import Any

import msgspec

from vipd.backends.nftables.objects import FAMILY_WORD, Chain, Rule, declare_chain
from vipd.proxy.names import Family

TABLE = "vipd-transparent"
ROUTE_TABLE = 119
"""Number of the routing table, and of the protocol that rule and route carry."""
PRIORITY = 90
"""Of the policy rule: after the table local, before those of tunnels and of the main table."""
_ICMP = {Family.IPV4: "icmp", Family.IPV6: "ipv6-icmp"}


def chain(family: Family, mark: str) -> Chain:
    """Return the chain that marks; `mark` is hexadecimal."""
    rule = Rule(
        f'iifname != "lo" meta l4proto {{ {_ICMP[family]}, tcp, udp }} socket transparent 1 '
        f"socket wildcard 0 meta mark set meta mark or {mark} accept",
        f"an answer to a transparent connection, {mark}",
    )
    # After connection tracking (-200), so that a source that was translated is found again.
    return Chain("answers", (rule,), "type filter hook prerouting priority -150")


def commands(family: Family, mark: str) -> list[str]:
    """Return the nft commands after which the table is right, whatever it was before."""
    word = FAMILY_WORD[family]
    return [f"add table {word} {TABLE}", *declare_chain(family, chain(family, mark), TABLE)]


def told(verb: str, family: Family, mark: str) -> str:
    """Return the change as nft and `ip` would be told it, line by line."""
    six = "-6 " if family is Family.IPV6 else ""
    table = [f"nft {one}" for one in commands(family, mark)]
    if verb == "del":
        table = [f"nft delete table {FAMILY_WORD[family]} {TABLE}"]
    rule = f"pref {PRIORITY} fwmark {mark}/{mark} lookup {ROUTE_TABLE} protocol {ROUTE_TABLE}"
    route = f"local default dev lo table {ROUTE_TABLE} proto {ROUTE_TABLE}"
    ip = [f"ip {six}route {verb} {route}", f"ip {six}rule {verb} {rule}"]
    return "\n".join((*ip, *table) if verb != "del" else (*table, *reversed(ip)))


def is_right(family: Family, mark: str, listing: bytes) -> bool:
    """Return whether `nft --json list table` tells of exactly what `commands` makes."""
    wanted = chain(family, mark)
    comments: dict[str, list[str]] = {}
    found: list[dict[str, Any]] = msgspec.json.decode(listing)["nftables"]
    for item in found:
        if "chain" in item:
            comments.setdefault(item["chain"]["name"], [])
        elif "rule" in item:
            comments.setdefault(item["rule"]["chain"], []).append(item["rule"].get("comment", ""))
    return comments == {wanted.name: list(wanted.comments)}
