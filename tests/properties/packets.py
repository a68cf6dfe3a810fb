"""What a packet meets in nftables: the model of the kernel's hooks.

`outcomes` runs the rules of the modelled kernel; what is right says oracle.py.
"""

from collections.abc import Iterator
from copy import deepcopy
from fractions import Fraction
from ipaddress import ip_address, ip_network
from math import prod

from tests.properties.kernel import Kernel, Table
from tests.properties.oracle import Outcome, Shares
from tests.properties.statements import Flight, Packet, parse

from vipd.backends.nftables.objects import TABLE
from vipd.proxy.names import Address

__all__ = ["Memory", "Outcome", "chances", "outcomes"]

Memory = dict[str, dict[str, str]]
"""Clients remembered, by map and source."""


class _Held:
    def __init__(self, table: Table, memory: Memory) -> None:
        self._table = table
        self.memory = memory

    def _of(self, container: str) -> dict[str, str]:
        held = self._table.containers[container]
        return self.memory.setdefault(container, {}) if "dynamic" in held.spec else held.elements

    def get(self, container: str, key: str) -> str | None:
        return self._of(container).get(key)

    def interval(self, container: str, key: str) -> bool:
        head, _, last = key.rpartition(" . ")
        for other in self._of(container):
            other_head, _, other_last = other.rpartition(" . ")
            if other_head == head and ip_address(last) in ip_network(other_last):
                return True
        return False

    def update(self, container: str, key: str, value: str | None) -> None:
        held = self._of(container)
        if value is None:
            held.pop(key, None)
        else:
            held[key] = value


def outcomes(
    kernel: Kernel, packet: Packet, own: frozenset[Address], memory: Memory | None = None
) -> dict[Outcome, Memory]:
    """Return everything that can become of the packet, each with what is remembered then."""
    found: dict[Outcome, Memory] = {}
    for outcome, left, _ in _runs(kernel, packet, own, memory):
        found.setdefault(outcome, left)
    return found


def chances(
    kernel: Kernel,
    packet: Packet,
    own: frozenset[Address],
    memory: Memory | None = None,
    table: str = TABLE,
) -> Shares:
    """Return everything that can become of the packet, with probabilities."""
    found: Shares = {}
    for outcome, _, probability in _runs(kernel, packet, own, memory, table):
        found[outcome] = found.get(outcome, Fraction(0)) + probability
    return found


def _runs(
    kernel: Kernel,
    packet: Packet,
    own: frozenset[Address],
    memory: Memory | None,
    name: str = TABLE,
) -> Iterator[tuple[Outcome, Memory, Fraction]]:
    choices: list[int] = []
    table = kernel.tables[packet.family, name]
    while True:
        held = _Held(table, deepcopy(memory or {}))
        flight = Flight(packet, own, held, choices)
        verdict = _travel(table, flight)
        widths = flight.widths
        yield _outcome(verdict, flight), held.memory, Fraction(1, prod(widths))
        choices = choices[: len(widths)]
        while choices and choices[-1] + 1 == widths[len(choices) - 1]:
            choices.pop()
        if not choices:
            return
        choices[-1] += 1


def _outcome(verdict: str, flight: Flight) -> Outcome:
    if verdict != "accept":
        return Outcome(verdict)
    if not flight.translated:
        return Outcome("pass", masqueraded=flight.masqueraded)
    # What ends on this node shows its source to nobody else: 0. of the reference.
    masqueraded = flight.masqueraded and flight.destination not in flight.own
    return Outcome("dnat", f"{flight.destination} . {flight.port}", masqueraded)


def _travel(table: Table, flight: Flight) -> str:
    """Return the verdict after all hooks on the packet's way; it is routed after translation."""
    verdict = _hook(table, flight, "prerouting" if flight.packet.interface else "output")
    if verdict != "accept":
        return verdict
    arrives = flight.destination in flight.own
    if flight.packet.interface:
        rest = ["input"] if arrives else ["forward", "postrouting"]
    else:  # what the node sends to itself goes out and comes in again
        rest = ["postrouting", "input"] if arrives else ["postrouting"]
    for hook in rest:
        verdict = _hook(table, flight, hook)
        if verdict != "accept":
            return verdict
    return "accept"


def _hook(table: Table, flight: Flight, hook: str) -> str:
    """Run the base chains of a hook by priority; what none refuses is accepted."""
    there = []
    for name, chain in table.chains.items():
        words = chain.hook.split(" ")
        if len(words) == 6 and words[3] == hook:
            there.append((int(words[5]), name))
    for _, name in sorted(there):
        verdict = _chain(table, flight, name)
        if verdict in ("drop", "reject"):
            return verdict
    return "accept"


def _chain(table: Table, flight: Flight, name: str) -> str | None:
    """Return accept, drop or reject, or None at the chain's end."""
    for text, _ in table.chains[name].rules:
        verdict = _rule(text, flight)
        if verdict is None:
            continue
        word, _, target = verdict.partition(" ")
        if word == "return":
            return None
        if word == "goto":
            return _chain(table, flight, target)
        if word == "jump":
            after = _chain(table, flight, target)
            if after is not None:
                return after
            continue
        return verdict
    return None


def _rule(text: str, flight: Flight) -> str | None:
    for statement in parse(text):
        result = statement(flight)
        if result is False:
            return None
        if isinstance(result, str):
            return result
    return None
