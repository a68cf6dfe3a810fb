"""What the kernel has of ours: what iptables-save prints, and the entries of our sets.

Lives here: the observed state, its decoding, and the state that a program leads to. Must not: run
a tool (driver.py), nor decide what should be there.
"""

import re
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from vipd.backends.iptables.compile import Program, all_chains, elements
from vipd.backends.iptables.objects import TABLES, Seen
from vipd.backends.iptables.pipeline import JUMPS, SETS
from vipd.backends.xtables import PREFIX
from vipd.proxy.names import Family

Place = tuple[Family, str]
"""Family and table."""
OTHER_MODES = (f"{PREFIX}IPVS",)
"""Beginnings of chains that are ours, but another mode's."""
_DIGEST = re.compile(r'#([0-9a-f]{8})"? ')


class Observed(Struct, frozen=True):
    """Chains, jumps and entries that carry our names.

    `jumps` are rules of the host's own chains that lead to ours, as printed, sorted. A set that
    is not there is not in `sets`.
    """

    chains: dict[Place, dict[str, Seen]] = {}
    jumps: dict[Place, list[tuple[str, str]]] = {}
    sets: dict[tuple[Family, str], set[str]] = {}

    def __bool__(self) -> bool:
        return any(self.chains.values()) or any(self.jumps.values()) or bool(self.sets)


class _Dump(Struct, array_like=True):
    chains: list[tuple[Family, str, dict[str, Seen]]]
    jumps: list[tuple[Family, str, list[tuple[str, str]]]]
    sets: list[tuple[Family, str, list[str]]]


def dump(seen: Observed) -> bytes:
    """Return the state as JSON, for a plan that is made in another process."""
    return msgspec.json.encode(
        _Dump(
            [(*place, chains) for place, chains in seen.chains.items()],
            [(*place, jumps) for place, jumps in seen.jumps.items()],
            [(*place, sorted(held)) for place, held in seen.sets.items()],
        )
    )


def load(text: bytes) -> Observed:
    """Return the state that `dump` wrote."""
    told = msgspec.json.decode(text, type=_Dump)
    return Observed(
        {(family, table): chains for family, table, chains in told.chains},
        {(family, table): jumps for family, table, jumps in told.jumps},
        {(family, name): set(held) for family, name, held in told.sets},
    )


def decode(saved: Mapping[Place, str], sets: Mapping[tuple[Family, str], set[str]]) -> Observed:
    """Return the state from what iptables-save printed for each table, and the sets there are."""
    chains: dict[Place, dict[str, Seen]] = {}
    jumps: dict[Place, list[tuple[str, str]]] = {}
    for place, text in saved.items():
        chains[place], jumps[place] = _decode(text)
    return Observed(chains, jumps, dict(sets))


def expected(wanted: Program) -> Observed:
    """Return what is observed where exactly `wanted` is in the kernel."""
    held = elements(wanted)
    places = [(family, table) for family in Family for table in TABLES]
    return Observed(
        {
            (family, table): {
                name: one.seen for name, one in all_chains(wanted, family, table).items()
            }
            for family, table in places
        },
        {
            (family, table): sorted((one.chain, one.rule) for one in JUMPS if one.table == table)
            for family, table in places
        },
        {(family, name): held.get((family, name), set()) for family in Family for name in SETS},
    )


def _decode(text: str) -> tuple[dict[str, Seen], list[tuple[str, str]]]:
    """Return our chains in a table, and the jumps to them from other chains."""
    digests: dict[str, str] = {}
    targets: dict[str, list[str]] = {}
    jumps: list[tuple[str, str]] = []
    ours = f":{PREFIX}"
    for line in text.splitlines():
        if line.startswith(ours):
            name = line[1:].split(" ", 1)[0]
            if not name.startswith(OTHER_MODES):
                targets[name] = []
        elif line.startswith("-A "):
            _, name, rule = line.split(" ", 2)
            held = targets.get(name)
            target = _target(rule)
            if held is not None:
                if not held:
                    found = _DIGEST.search(rule)
                    digests[name] = found[1] if found else ""
                held.append(target)
            elif target[3:] in targets:
                jumps.append((name, rule))
    return (
        {name: Seen(digests.get(name, ""), tuple(held)) for name, held in targets.items()},
        sorted(jumps),
    )


def _target(rule: str) -> str:
    """Return what stands from the last ``-j`` or ``-g`` on; comments come before it."""
    at = max(rule.rfind(" -j "), rule.rfind(" -g "))
    if at >= 0:
        return rule[at + 1 :]
    return rule if rule.startswith(("-j ", "-g ")) else ""
