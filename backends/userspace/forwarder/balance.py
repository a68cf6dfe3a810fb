"""Which endpoint a new connection gets, by each algorithm.

Lives here: the choice among endpoints, and what each algorithm remembers for it. Pure. Must not:
know who is set aside or why (health.py), or who stays with whom (affinity.py); those to be passed
over are given with each question.

A choice costs the same for three endpoints and for three hundred, save least-connections, which
looks at each. Where some are passed over it may cost a look at each: that is rare.
Sources: Maglev as in slots.py; round-robin as stride scheduling (Waldspurger and Weihl, MIT 1995),
which gives in each round exactly the weights, evenly interleaved.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from hashlib import blake2b
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import Protocol

from msgspec import Struct

from vipd.backends.slots import maglev
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Address
from vipd.proxy.virtualserver import Endpoint

Spot = tuple[Address, int]
"""What an endpoint is known by while its weight and the rest may change: address and port."""
Chance = Callable[[], float]
"""Floats from 0 to below 1."""

DRAWS = 4
"""How often a random choice is drawn anew before those that are left are counted."""
STRIDE = 1 << 32
"""The stride of weight 1; a whole number, so that turns never drift."""


def spot_of(endpoint: Endpoint) -> Spot:
    """Return what the endpoint is known by."""
    return endpoint.address, endpoint.port


class Load(Struct, eq=False):
    """What an endpoint carries."""

    endpoint: Endpoint
    connections: int = 0
    """Open now."""
    pending: int = 0
    """Chosen for, and neither open nor given up."""
    so_far: int = 0
    """Established since the start."""
    failures: int = 0
    """Refused or timed out since the start."""


class Balance(Protocol):
    """An algorithm over a list of endpoints."""

    def choose(self, client: str, client_port: int, passed: AbstractSet[Spot]) -> Endpoint | None:
        """Return the endpoint whose turn it is, passing over `passed`; None: none is left.

        `client` is the client's address as text, always the same text for one address.
        """
        ...


def balance(
    algorithm: Algorithm, loads: Sequence[Load], chance: Chance, before: Balance | None = None
) -> Balance:
    """Return the algorithm over these endpoints. It goes on where `before` was, if it can.

    Least-connections reads `loads` at each choice; the others take the endpoints as they are now.
    """
    endpoints = tuple(one.endpoint for one in loads)
    match algorithm:
        case Algorithm.ROUND_ROBIN:
            return _RoundRobin(endpoints, chance, before)
        case Algorithm.SOURCE_HASH:
            return _Hash(endpoints, with_port=False)
        case Algorithm.MAGLEV:
            return _Hash(endpoints, with_port=True)
        case Algorithm.LEAST_CONNECTIONS:
            return _LeastConnections(loads, chance)
        case Algorithm.RANDOM:
            return _Random(endpoints, chance)


class _Random:
    def __init__(self, endpoints: Sequence[Endpoint], chance: Chance) -> None:
        self._endpoints = endpoints
        self._chance = chance
        weights = [one.weight for one in endpoints]
        self._bounds = list(accumulate(weights)) if len(set(weights)) > 1 else None

    def choose(self, client: str, client_port: int, passed: AbstractSet[Spot]) -> Endpoint | None:
        if not self._endpoints:
            return None
        if not passed:
            return self._draw()
        for _ in range(DRAWS):
            drawn = self._draw()
            if spot_of(drawn) not in passed:
                return drawn
        left = [one for one in self._endpoints if spot_of(one) not in passed]
        return _Random(left, self._chance)._draw() if left else None

    def _draw(self) -> Endpoint:
        # min(): a float that is almost 1 can be rounded up to the end of a long list.
        last = len(self._endpoints) - 1
        if self._bounds is None:
            return self._endpoints[min(int(self._chance() * (last + 1)), last)]
        drawn = self._chance() * self._bounds[-1]
        return self._endpoints[min(bisect_right(self._bounds, drawn), last)]


class _RoundRobin:
    """Each endpoint is due every STRIDE / weight; the one due first is next.

    The first turns are drawn, so that neither many workers nor many changes begin with the same
    endpoint. Who stays in the list keeps its turn.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], chance: Chance, before: Balance | None
    ) -> None:
        held = before._turns() if isinstance(before, _RoundRobin) else {}
        self._now: int = before._now if isinstance(before, _RoundRobin) else 0
        self._due: list[tuple[int, int, Endpoint]] = []
        for index, one in enumerate(endpoints):
            stride = STRIDE // one.weight
            due = held.get(spot_of(one)) if held else None
            if due is None or due > self._now + stride:  # new, or heavier than it was
                due = self._now + int(chance() * stride)
            self._due.append((due, index, one))
        heapify(self._due)

    def choose(self, client: str, client_port: int, passed: AbstractSet[Spot]) -> Endpoint | None:
        if not self._due:
            return None
        due, index, chosen = self._due[0]
        if passed and spot_of(chosen) in passed:
            return self._first_left(passed)
        self._now = due
        heapreplace(self._due, (due + STRIDE // chosen.weight, index, chosen))
        return chosen

    def _first_left(self, passed: AbstractSet[Spot]) -> Endpoint | None:
        """Return who is due first of those that are left. Who was passed over lost that turn."""
        left = [one for one in self._due if spot_of(one[2]) not in passed]
        if not left:
            return None
        self._now, _, chosen = min(left)
        self._due = [
            (self._now + STRIDE // one.weight, index, one)
            if one is chosen or (due <= self._now and spot_of(one) in passed)
            else (due, index, one)
            for due, index, one in self._due
        ]
        heapify(self._due)
        return chosen

    def _turns(self) -> dict[Spot, int]:
        return {spot_of(one): due for due, _, one in self._due}


class _Hash:
    """The Maglev table at the hash of the client: the same in every worker and on every node."""

    def __init__(self, endpoints: tuple[Endpoint, ...], with_port: bool) -> None:
        self._endpoints = endpoints
        self._with_port = with_port
        self._table: tuple[Endpoint, ...] | None = None

    def choose(self, client: str, client_port: int, passed: AbstractSet[Spot]) -> Endpoint | None:
        if self._table is None:  # made when it is needed: it takes milliseconds
            self._table = maglev(self._endpoints)
        if not self._table:
            return None
        key = f"{client} {client_port}" if self._with_port else client
        digest = blake2b(key.encode(), digest_size=8).digest()
        position = int.from_bytes(digest, "big") % len(self._table)
        chosen = self._table[position]
        if not passed or spot_of(chosen) not in passed:
            return chosen
        if all(spot_of(one) in passed for one in self._endpoints):
            return None
        later = (*self._table[position:], *self._table[:position])
        return next((one for one in later if spot_of(one) not in passed), None)


class _LeastConnections:
    """Those that are being connected count: in a burst nothing is open before all are chosen."""

    def __init__(self, loads: Sequence[Load], chance: Chance) -> None:
        self._loads = loads
        self._chance = chance

    def choose(self, client: str, client_port: int, passed: AbstractSet[Spot]) -> Endpoint | None:
        fewest = float("inf")
        level: list[Endpoint] = []
        for load in self._loads:
            endpoint = load.endpoint
            if passed and spot_of(endpoint) in passed:
                continue
            share = (load.connections + load.pending) / endpoint.weight
            if share < fewest:
                fewest, level = share, [endpoint]
            elif share == fewest:
                level.append(endpoint)
        if not level:
            return None
        return level[min(int(self._chance() * len(level)), len(level) - 1)]
