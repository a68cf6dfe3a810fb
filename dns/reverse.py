"""Names of addresses: in-addr.arpa and ip6.arpa of the cluster's networks.

Lives here: which services stand behind an address, and which reverse names the zone answers for.
Pure. Must not: know the services' names (zone.py makes the PTR records).
A network that does not end between two labels (10.96.0.0/12) is answered for as several zones, cut
at the next label (96.10.in-addr.arpa to 111.10.in-addr.arpa).
"""

from bisect import bisect_left
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from vipd.dns.names import IN_ADDR, IP6, reverse_part, starts
from vipd.dns.service_names import ServiceNames
from vipd.proxy.names import Network

MOST_TOUCHED = 100
"""Addresses that are put in their places one by one, 5 us each; more are sorted with the others."""


class At(Enum):
    """What a reverse name is."""

    APEX = "the top of a network"
    ADDRESS = "an address that a service has"
    BETWEEN = "above such an address"
    NOTHING = "no name"


class Place(NamedTuple):
    """A name that the zone answers for; `apex` is where the name of its zone begins in it."""

    at: At
    apex: int
    packed: bytes = b""


class _Tree(NamedTuple):
    """A tree of reverse names: one label has `unit` bits, an address `most` labels."""

    suffix: bytes
    unit: int
    most: int

    def packed(self, value: int) -> bytes:
        return value.to_bytes(self.unit * self.most // 8)


class _Cut(NamedTuple):
    """A network: the first bits of its addresses, and how many labels its zones' names add."""

    prefix: int
    bits: int
    labels: int


_TREES = {4: _Tree(IN_ADDR, 8, 4), 6: _Tree(IP6, 4, 32)}


class ReverseNames:
    """The addresses of services, and the networks whose addresses are answered for."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._services: dict[bytes, ServiceNames | tuple[ServiceNames, ...]] = {}
        """Nearly all have one: a tuple for each would cost as much as the rest."""
        self._sorted: dict[int, list[bytes]] = {}
        """By length of the address; made when asked for."""
        self._touched: dict[int, set[bytes]] = {4: set(), 16: set()}
        """Addresses that may have come or gone since it was made."""
        self._cuts: dict[_Tree, list[_Cut]] = {tree: [] for tree in _TREES.values()}
        for one in networks:
            tree, bits = _TREES[one.version], one.prefixlen
            prefix = int(one.network_address) >> (one.max_prefixlen - bits)
            self._cuts[tree].append(_Cut(prefix, bits, -(-bits // tree.unit)))
        for cuts in self._cuts.values():
            cuts.sort(key=lambda cut: -cut.labels)  # of nested networks the inner one

    def add(self, packed: bytes, service: ServiceNames) -> None:
        """Let a service have an address."""
        others = self.services(packed)
        self._services[packed] = (*others, service) if others else service
        self._touch(packed)

    def remove(self, packed: bytes, service: ServiceNames) -> None:
        """Take an address from a service that has it."""
        rest = tuple([one for one in self.services(packed) if one is not service])
        del self._services[packed]
        if rest:
            self._services[packed] = rest if len(rest) > 1 else rest[0]
        self._touch(packed)

    def services(self, packed: bytes) -> tuple[ServiceNames, ...]:
        """Return the services that have an address."""
        found = self._services.get(packed, ())
        return found if isinstance(found, tuple) else (found,)

    def covers(self, packed: bytes) -> bool:
        """Return whether an address is in one of the networks."""
        tree = _TREES[4 if len(packed) == 4 else 6]
        value, length = int.from_bytes(packed), 8 * len(packed)
        return any(value >> (length - cut.bits) == cut.prefix for cut in self._cuts[tree])

    def place(self, key: bytes) -> Place | None:
        """Return what a reverse name is, None if others answer for it.

        An address that a service has is answered for, even outside of the networks.
        """
        tree = _tree_of(key)
        if tree is None:
            return None
        labels = starts(key)
        top = len(key) - len(tree.suffix)
        if top not in labels:  # the suffix begins inside of a label
            return None
        labels = labels[: labels.index(top)]
        value, depth = _number(key, labels, tree)
        packed = tree.packed(value) if depth == tree.most == len(labels) else b""
        known = packed in self._services
        labels.append(top)
        for cut in self._cuts[tree]:
            bits = depth * tree.unit
            if cut.labels <= depth and value >> (bits - cut.bits) == cut.prefix:
                apex = labels[-1 - cut.labels]
                break
        else:
            return Place(At.ADDRESS, 0, packed) if known else None
        if known:
            return Place(At.ADDRESS, apex, packed)
        if apex == 0:
            return Place(At.APEX, apex)
        whole = depth == len(labels) - 1
        return Place(At.BETWEEN if whole and self._below(value, depth, tree) else At.NOTHING, apex)

    def _below(self, value: int, depth: int, tree: _Tree) -> bool:
        """Return whether an address begins with a number of that many labels."""
        rest = (tree.most - depth) * tree.unit
        low, high = tree.packed(value << rest), tree.packed((value + 1 << rest) - 1)
        found = self._in_order(len(low))
        first = bisect_left(found, low)
        return first < len(found) and found[first] <= high

    def _touch(self, packed: bytes) -> None:
        """Note that an address may have come or gone."""
        touched = self._touched[len(packed)]
        touched.add(packed)
        if len(touched) > MOST_TOUCHED:
            touched.clear()
            self._sorted.pop(len(packed), None)

    def _in_order(self, length: int) -> list[bytes]:
        """Return the addresses of one length, in order."""
        found, touched = self._sorted.get(length), self._touched[length]
        if found is None:
            found = sorted([packed for packed in self._services if len(packed) == length])
            self._sorted[length] = found
        else:
            for packed in touched:
                at = bisect_left(found, packed)
                is_there = at < len(found) and found[at] == packed
                if is_there and packed not in self._services:
                    del found[at]
                elif packed in self._services and not is_there:
                    found.insert(at, packed)
        touched.clear()
        return found


def _tree_of(key: bytes) -> _Tree | None:
    return next((tree for tree in _TREES.values() if key.endswith(tree.suffix)), None)


def _number(key: bytes, labels: list[int], tree: _Tree) -> tuple[int, int]:
    """Return the number that the labels next to the tree's suffix spell, and how many they are."""
    value, depth = 0, 0
    for at in reversed(labels[-tree.most :]):
        part = reverse_part(key[at + 1 : at + 1 + key[at]], octet=tree.unit == 8)
        if part is None:
            break
        value, depth = value << tree.unit | part, depth + 1
    return value, depth
