"""What there is of userspace mode, as values: routes, our nft tables, and what workers serve.

Lives here: the observed state, its decoding and its dump. Must not: read the kernel or ask workers
(driver.py), nor decide what should be there (plan.py).
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from vipd.backends.nftables.observed import element_of
from vipd.backends.userspace.messages import (
    WireForwarding,
    WirePlace,
    WireSurroundings,
    forwarding_of,
    place_of,
    surroundings_of,
    wire_forwarding,
    wire_place,
    wire_surroundings,
)
from vipd.backends.userspace.objects import (
    Element,
    Forwarding,
    Place,
    ReturnPath,
    Route,
    Surroundings,
    Thing,
    Value,
)
from vipd.proxy.names import Address, Family, parse_address

Fixed = tuple[tuple[str, ...], tuple[str, ...]]
"""Comments of the sets, and rules of the chains, of one table (rules.fixed)."""


class Observed(Struct, frozen=True):
    """Everything of ours. `strange` are addresses whose local route is another owner's.

    `surroundings` is what the workers know of the node; None where there is none, or they differ.
    """

    things: Mapping[Thing, Value] = {}
    fixed: Mapping[Family, Fixed] = {}
    surroundings: Surroundings | None = None
    strange: frozenset[Address] = frozenset()


def decode(listing: bytes) -> tuple[Fixed, list[tuple[str, str]]]:
    """Return the fixed part and the elements, as (set, text), of `nft --json list table`."""
    sets: list[str] = []
    chains: dict[str, list[str]] = {}
    elements: list[tuple[str, str]] = []
    for item in msgspec.json.decode(listing)["nftables"]:
        for word, one in _named(item):
            if word == "set":
                sets.append(f"{one['name']} {one.get('comment', '')}")
                elements += [(one["name"], element_of(each)[0]) for each in one.get("elem", ())]
            elif word == "chain":
                chains.setdefault(one["name"], [])
            elif word == "rule":
                chains.setdefault(one["chain"], []).append(one.get("comment", ""))
    rules = sorted(f"{name} {tuple(comments)}" for name, comments in chains.items())
    return (tuple(sorted(sets)), tuple(rules)), elements


def _named(item: Any) -> list[tuple[str, Any]]:
    return [(word, one) for word, one in item.items() if word in ("set", "chain", "rule")]


class _Dump(Struct, array_like=True):
    """An Observed as JSON can hold it."""

    routes: list[tuple[Family, str, str]]
    elements: list[tuple[Family, str, str]]
    places: list[tuple[WirePlace, WireForwarding]]
    fixed: list[tuple[Family, Fixed]]
    surroundings: WireSurroundings | None
    return_paths: list[tuple[Family, str]] = []


def dump(seen: Observed) -> bytes:
    """Return the state as JSON, for a plan that is made in another process."""
    around = None if seen.surroundings is None else wire_surroundings(seen.surroundings)
    told = _Dump([], [], [], list(seen.fixed.items()), around)
    for thing, value in seen.things.items():
        if isinstance(thing, Route):
            told.routes.append((thing.family, str(thing.address), str(value)))
        elif isinstance(thing, Element):
            told.elements.append(thing)
        elif isinstance(thing, ReturnPath):
            told.return_paths.append((thing.family, str(value)))
        elif isinstance(thing, Place) and isinstance(value, Forwarding):
            told.places.append((wire_place(thing), wire_forwarding(value)))
    return msgspec.json.encode(told)


def load(text: bytes) -> Observed:
    """Return the state that `dump` wrote."""
    told = msgspec.json.decode(text, type=_Dump)
    things: dict[Thing, Value] = {}
    for family, address, source in told.routes:
        things[Route(family, parse_address(address))] = source
    for family, name, element in told.elements:
        things[Element(family, name, element)] = ""
    for place, forwarding in told.places:
        things[place_of(place)] = forwarding_of(forwarding)
    things |= {ReturnPath(family): mark for family, mark in told.return_paths}
    around = None if told.surroundings is None else surroundings_of(told.surroundings)
    return Observed(things, dict(told.fixed), around)
