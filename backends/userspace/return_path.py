"""The return path of transparent connections: what brings an endpoint's answers to the worker.

Lives here: the rules that mark them, the policy rule and the route for what is marked, as text.
Pure. Must not: run nft or talk to the kernel (policy_routing.py).

An endpoint answers to the client's address. What passes this node and belongs to a transparent
connection of it is marked before it is routed, and what is marked is routed to the node itself, the
ICMP errors of the endpoint as well. Connection tracking says what belongs to one: its entries carry
0x54 ("T") in the top byte of the connection mark, as those of NAT carry the generation of their
program. To look for a socket for every packet would cost all that passes the node, so this is done
only where an entry is new: the one before may have been forgotten. A socket that is bound to no
address is somebody else's, who takes packets for any destination (``socket wildcard``).
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
_OURS = "ct mark and 0xff000000 == 0x54000000"
_NOTE = "ct mark set ct mark and 0x00ffffff or 0x54000000"
_SOCKET = "socket transparent 1 socket wildcard 0"


def chains(family: Family, mark: str) -> tuple[Chain, ...]:
    """Return the chains that mark; `mark` is hexadecimal."""
    then = f"meta mark set meta mark or {mark} accept"
    leaving = Rule(f"ct state new {_SOCKET} {_NOTE}", "a transparent connection begins")
    known = Rule(f"{_OURS} {then}", f"an answer to one, {mark}")
    forgotten = Rule(
        f'iifname != "lo" ct state new,untracked,invalid '
        f"meta l4proto {{ {_ICMP[family]}, tcp, udp }} {_SOCKET} {_NOTE} {then}",
        f"an answer, and its connection was forgotten, {mark}",
    )
    # After connection tracking (-200), and before NAT (-100).
    return (
        Chain("leaving", (leaving,), "type filter hook output priority -150"),
        Chain("answers", (known, forgotten), "type filter hook prerouting priority -150"),
    )


def commands(family: Family, mark: str) -> list[str]:
    """Return the nft commands after which the table is right, whatever it was before."""
    word = FAMILY_WORD[family]
    made = [line for one in chains(family, mark) for line in declare_chain(family, one, TABLE)]
    return [f"add table {word} {TABLE}", *made]


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
    wanted = {one.name: list(one.comments) for one in chains(family, mark)}
    comments: dict[str, list[str]] = {}
    found: list[dict[str, Any]] = msgspec.json.decode(listing)["nftables"]
    for item in found:
        if "chain" in item:
            comments.setdefault(item["chain"]["name"], [])
        elif "rule" in item:
            comments.setdefault(item["rule"]["chain"], []).append(item["rule"].get("comment", ""))
    return comments == wanted
