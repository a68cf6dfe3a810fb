"""What the kernel has of ours: `nft --json list table` as values.

Lives here: the observed state and its decoding, the one place where nft's JSON is read. Must not:
run nft (driver.py), nor decide what should be there. Everything is brought to the spelling that
compile.py writes, so that comparing texts is enough. JSON schema: libnftables-json(5), nft 1.0.6.
"""

from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec
from msgspec import Struct

from vipd.backends.nftables.objects import FAMILY_OF_WORD, SKELETON, TABLE, Element
from vipd.backends.nftables.pipeline import (
    LOCAL_SLOTS,
    containers,
    skeleton,
)
from vipd.proxy.names import Family, Protocol, parse_address
from vipd.proxy.virtualserver import Endpoint, Key

_PROTOCOLS = {one.value for one in Protocol}
_PROTOCOL_OF_NUMBER = {"6": "tcp", "17": "udp", "132": "sctp"}

Place = tuple[Family, str]
"""Family and name of a container or chain."""


class Observed(Struct, frozen=True):
    """Tables, chains and elements that carry our names.

    `containers` and `chains` hold comments (see objects.py on digests); `elements` the content of
    the constant containers only: what clients were remembered is nobody's business.
    """

    tables: frozenset[Place] = frozenset()
    containers: dict[Place, str] = {}
    chains: dict[Place, tuple[str, ...]] = {}
    elements: dict[Place, dict[str, str]] = {}
    skeletons: frozenset[Family] = frozenset()
    """Families whose skeleton is whole."""

    def has_table(self, family: Family) -> bool:
        """Return whether the family has our table, in whatever state."""
        return (family, TABLE) in self.tables

    def has_skeleton(self, family: Family) -> bool:
        """Return whether the family's skeleton is in place."""
        return family in self.skeletons

    def has(self, family: Family, element: Element) -> bool:
        """Return whether the element is there with this value."""
        return self.elements.get((family, element.container), {}).get(element.key) == element.value

    def own_maps(self, family: Family) -> list[str]:
        """Return the names of maps that belong to a service port."""
        constant = {one.name for one in containers(family)}
        return [name for of, name in self.containers if of is family and name not in constant]

    def without(self, family: Family) -> "Observed":
        """Return the state as it is once the family's table is deleted."""
        return Observed(
            frozenset(one for one in self.tables if one != (family, TABLE)),
            {place: one for place, one in self.containers.items() if place[0] is not family},
            {place: one for place, one in self.chains.items() if place[0] is not family},
            {place: one for place, one in self.elements.items() if place[0] is not family},
            self.skeletons,
        )


class _Dump(Struct, array_like=True):
    """An Observed as JSON can hold it: places are flat lists."""

    tables: list[tuple[Family, str]]
    containers: list[tuple[Family, str, str]]
    chains: list[tuple[Family, str, tuple[str, ...]]]
    elements: list[tuple[Family, str, dict[str, str]]]
    skeletons: list[Family]


def dump(seen: Observed) -> bytes:
    """Return the state as JSON, for a plan that is made in another process."""
    return msgspec.json.encode(
        _Dump(
            sorted(seen.tables),
            [(*place, comment) for place, comment in seen.containers.items()],
            [(*place, rules) for place, rules in seen.chains.items()],
            [(*place, held) for place, held in seen.elements.items()],
            sorted(seen.skeletons),
        )
    )


def load(text: bytes) -> Observed:
    """Return the state that `dump` wrote."""
    told = msgspec.json.decode(text, type=_Dump)
    return Observed(
        frozenset(told.tables),
        {(family, name): comment for family, name, comment in told.containers},
        {(family, name): rules for family, name, rules in told.chains},
        {(family, name): held for family, name, held in told.elements},
        frozenset(told.skeletons),
    )


def decode(listings: Iterable[bytes]) -> Observed:
    """Return the state that `nft --json list table` printed, one listing for each table."""
    tables: set[Place] = set()
    found: dict[Place, str] = {}
    chains: dict[Place, list[str]] = {}
    elements: dict[Place, dict[str, str]] = {}
    skeleton_rules: dict[Family, list[str]] = {}
    constant = {(family, one.name) for family in Family for one in containers(family)}
    for listing in listings:
        for item in msgspec.json.decode(listing)["nftables"]:
            for word, one in item.items():
                if word == "metainfo":
                    continue
                family = FAMILY_OF_WORD[one["family"]]
                name = one["name"] if word == "table" else one["table"]
                if word == "table":
                    tables.add((family, name))
                elif name == SKELETON:
                    if word == "rule":
                        skeleton_rules.setdefault(family, []).append(one.get("comment", ""))
                elif word in ("set", "map"):
                    place = (family, one["name"])
                    found[place] = one.get("comment", "")
                    if place in constant:
                        try:
                            elements[place] = dict(map(element_of, one.get("elem", ())))
                        except (LookupError, TypeError, ValueError):
                            # Somebody put in what we would not: build it all anew.
                            found[place] = "not understood"
                elif word == "chain":
                    chains.setdefault((family, one["name"]), [])
                elif word == "rule":
                    chains.setdefault((family, one["chain"]), []).append(one.get("comment", ""))
    wanted = list(skeleton().comments)
    return Observed(
        frozenset(tables),
        found,
        {place: tuple(rules) for place, rules in chains.items()},
        elements,
        frozenset(family for family, rules in skeleton_rules.items() if rules == wanted),
    )


def slots_of(
    seen: Observed, family: Family
) -> dict[Key, tuple[tuple[Endpoint, ...], tuple[Endpoint, ...]]]:
    """Return the endpoints in each key's slots, cluster list and local list, in order of slots.

    Only address and port of the endpoints are known. A hole closes up, which makes the plan move
    an endpoint; a running program has none.
    """
    found: dict[Key, dict[int, str]] = {}
    for prefix in ("", "node-port-"):
        targets = seen.elements.get((family, f"{prefix}endpoints"), {})
        identities = seen.elements.get((family, f"{prefix}endpoint-ids"), {})
        for text, value in (*targets.items(), *identities.items()):
            key_text, _, slot = text.rpartition(" . ")
            number = _number(slot)
            if number > LOCAL_SLOTS * 2:
                continue  # an endpoint by identity, reached through its slots
            target = targets.get(f"{key_text} . {value}") if text in identities else value
            key = _key(family, key_text)
            if target is not None and key is not None:
                found.setdefault(key, {})[number] = target
    result = {}
    for key, slots in found.items():
        ordered = [(number, _endpoint(slots[number])) for number in sorted(slots)]
        result[key] = (
            tuple(one for number, one in ordered if number <= LOCAL_SLOTS),
            tuple(one for number, one in ordered if number > LOCAL_SLOTS),
        )
    return result


def element_of(item: Any) -> tuple[str, str]:
    """Return key and value of an element as nft's JSON gives it; a set's value is empty."""
    key, value = item if isinstance(item, list) else (item, None)
    if isinstance(key, dict) and "elem" in key:
        key = key["elem"]["val"]
    return _key_text(key), "" if value is None else _text(value)


def _key_text(key: Any) -> str:
    """Return a key as compile.py spells it; its first part that is no address is a protocol.

    Where /etc/protocols is missing (no package netbase), nft prints the protocol's number.
    """
    if not (isinstance(key, dict) and "concat" in key):
        return _text(key)
    parts = list(map(_text, key["concat"]))
    for place, part in enumerate(parts):
        if "." not in part and ":" not in part:
            parts[place] = _PROTOCOL_OF_NUMBER.get(part, part)
            break
    return " . ".join(parts)


def _text(value: Any) -> str:
    """Return a key or value as compile.py spells it."""
    if isinstance(value, dict):
        if "concat" in value:
            return " . ".join(map(_text, value["concat"]))
        if "prefix" in value:
            prefix = value["prefix"]
            return str(ip_network((prefix["addr"], prefix["len"])))
        for word in ("goto", "jump"):
            if word in value:
                return f"{word} {value[word]['target']}"
        (word,) = value
        if word in ("accept", "drop"):
            return str(word)
        raise ValueError(f"not ours: {value}")
    if isinstance(value, str) and value.count(":") > 1:
        return str(ip_address(value))  # inet_ntop and Python differ on IPv4-mapped addresses
    return str(value)


def _key(family: Family, text: str) -> Key | None:
    """Return the key, or None for one that no virtual server can have (a stray of somebody's)."""
    parts = text.split(" . ")
    if parts[-2].upper() not in _PROTOCOLS:
        return None
    address = parse_address(parts[0]) if len(parts) == 3 else None
    return Key(family, address, Protocol(parts[-2].upper()), int(parts[-1]))


def _number(classid: str) -> int:
    high, _, low = classid.partition(":")
    return int(high, 16) << 16 | int(low, 16)


def _endpoint(target: str) -> Endpoint:
    address, port = target.split(" . ")
    return Endpoint(parse_address(address), int(port))
