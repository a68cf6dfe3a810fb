"""Slots: which endpoint stands at which position of a virtual server's table of choices.

Lives here: weights to slots, the assignment that moves as little as possible, Maglev tables. Pure.
Must not: know how a dataplane stores slots.
Source of Maglev: D. Eisenbud et al., NSDI 2016, §3.4.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from math import gcd

from vipd.proxy.names import Address
from vipd.proxy.virtualserver import Endpoint

MOST_SLOTS = 65535
"""A slot number has 16 bits in the dataplanes, and 0 is none."""
MAGLEV_SIZES = (1021, 10007, 65521)
"""Sizes of Maglev tables, prime. The smallest with ten slots for each share is taken, so that
shares are within about 10 % of fair; the largest fits MOST_SLOTS."""


def assign(before: Sequence[Endpoint], endpoints: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the slots for `endpoints`, each as many as it weighs, moving as little as possible.

    Endpoints keep the slots they have in `before`; what stands behind the new end moves into the
    holes, and new endpoints take what is left. Weights are divided by their common divisor, and
    endpoints beyond MOST_SLOTS get none.
    """
    endpoints = endpoints[:MOST_SLOTS]
    if not before and all(one.weight == 1 for one in endpoints):
        return tuple(endpoints)  # by far the most frequent case, and a cold start is made of it
    shares = _shares(endpoints)
    current = {(one.address, one.port): one for one in endpoints}
    if len(current) < len(endpoints):
        raise ValueError("an endpoint stands twice")
    total = sum(shares.values())
    slots: list[Endpoint | None] = [None] * total
    left = Counter(shares)
    homeless: list[Endpoint] = []
    for position, held in enumerate(before):
        place = (held.address, held.port)
        if left[place] <= 0:
            continue
        left[place] -= 1
        if position < total:
            slots[position] = current[place]
        else:
            homeless.append(current[place])
    for endpoint in endpoints:
        homeless.extend([endpoint] * left[(endpoint.address, endpoint.port)])
    rest = iter(homeless)
    return tuple(one if one is not None else next(rest) for one in slots)


@lru_cache(maxsize=32)
def maglev(endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return the Maglev table: the same on every node, and little of it moves on a change.

    An endpoint of weight w takes w turns in each round. Remembered, because all addresses of a
    service port have the same.
    """
    endpoints = endpoints[:MOST_SLOTS]
    if not endpoints:
        return ()
    shares = _shares(endpoints)
    total = sum(shares.values())
    size = next((one for one in MAGLEV_SIZES if one >= 10 * total), MAGLEV_SIZES[-1])
    walks = [(one, shares[(one.address, one.port)], *_walk(one, size)) for one in endpoints]
    table: list[Endpoint | None] = [None] * size
    steps = [0] * len(walks)
    filled = 0
    while True:
        for index, (endpoint, turns, offset, skip) in enumerate(walks):
            for _ in range(turns):
                while True:
                    place = (offset + steps[index] * skip) % size
                    steps[index] += 1
                    if table[place] is None:
                        break
                table[place] = endpoint
                filled += 1
                if filled == size:
                    return tuple(one for one in table if one is not None)


def _walk(endpoint: Endpoint, size: int) -> tuple[int, int]:
    digest = blake2b(str(endpoint).encode(), digest_size=16).digest()
    return (
        int.from_bytes(digest[:8], "big") % size,
        int.from_bytes(digest[8:], "big") % (size - 1) + 1,
    )


def _shares(endpoints: Sequence[Endpoint]) -> dict[tuple[Address, int], int]:
    """Return how many slots each endpoint gets: its weight, reduced, and fitted into MOST_SLOTS."""
    divisor = gcd(*(one.weight for one in endpoints)) or 1
    shares = {(one.address, one.port): one.weight // divisor for one in endpoints}
    total = sum(shares.values())
    if total <= MOST_SLOTS:
        return dict(shares)
    return {
        place: max(1, share * (MOST_SLOTS - len(shares)) // total)
        for place, share in shares.items()
    }
