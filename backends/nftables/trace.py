"""What one packet meets in the nftables program: `vipd explain`, rule by rule.

Lives here: a reading of the very rules that are loaded, for the first packet of one connection.
Must not: follow chance (a choice among slots is one step), nor guess: a rule that it cannot read is
a ValueError, so that a new shape of rule needs a line here.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from vipd.backends.nftables.compile import Program, Shared, elements, key_text, own_objects
from vipd.backends.nftables.objects import FAMILY_WORD, TABLE, Chain, Rule
from vipd.backends.nftables.pipeline import chains, classid, shape_chain
from vipd.backends.protocol import Packet, Step
from vipd.proxy.names import Protocol, family_of, parse_network
from vipd.proxy.virtualserver import Key

MOST_TARGETS = 4
"""Endpoints that the step of a choice names; the others are counted."""


def trace(program: Program, packet: Packet) -> Sequence[Step]:
    """Return every rule that the packet matches, hook after hook, with the element that decided.

    Costs as much as the virtual server that answers, whatever else the program holds.
    """
    return _walk(program, packet).steps


def looked_up(program: Program, packet: Packet) -> Sequence[tuple[str, str]]:
    """Return the elements that the packet finds, as (map, key), in order; every slot that may be
    picked counts. The map of remembered clients is there too, whether it knows this one or not."""
    return _walk(program, packet).found


def _walk(program: Program, packet: Packet) -> "_Walk":
    walk = _Walk(program, packet)
    if packet.from_node:
        hooks = ["nat-output", "filter-output", "nat-postrouting"]
    else:
        hooks = ["nat-prerouting", "filter-forward", "nat-postrouting"]
    for hook in hooks:
        arrives = packet.to_node and not walk.targets and hook == "filter-forward"
        if walk.hook("filter-input" if arrives else hook) or arrives:
            return walk
    if packet.from_node and packet.to_node and not walk.targets:
        walk.hook("filter-input")
    return walk


class _Did(NamedTuple):
    """What a statement did: in words (empty where the rule's text says it), and its verdict."""

    said: str = ""
    verdict: str = ""


_NO_MATCH = None
_Groups = tuple[str, ...]


class _Walk:
    """A packet on its way; `targets` are the endpoints it may have been translated to."""

    def __init__(self, program: Program, packet: Packet) -> None:
        self.packet = packet
        self.family = family_of(packet.destination)
        self.shared = program.shared
        self.steps: list[Step] = []
        self.found: list[tuple[str, str]] = []
        self.slots: list[str] = []
        self.targets: list[str] = []
        self.marked = False
        self._held: dict[tuple[str, str], str] = {}
        self._chains = {one.name: one for one in chains(self.family, program.network)}
        self._n = key_text(Key(self.family, None, packet.protocol, packet.port))
        for address in (packet.destination, None):
            entry = program.entries.get(Key(self.family, address, packet.protocol, packet.port))
            if entry is not None:
                self._held |= {(one.container, one.key): one.value for one in elements(entry)}
                self._chains |= {one.name: one for one in own_objects(entry).chains}

    def hook(self, name: str) -> bool:
        """Walk a base chain; return whether the packet ends there."""
        return self._chain(self._chains[name]) in ("drop", "reject")

    def _chain(self, chain: Chain) -> str:
        """Return what becomes of the packet: accept, drop or reject; return at the chain's end."""
        hook = f" ({chain.hook.removeprefix('type ')})" if chain.hook else ""
        for rule in chain.rules:
            did = self._rule(rule)
            if did is _NO_MATCH:
                continue
            where = f"{FAMILY_WORD[self.family]} {TABLE} {chain.name}{hook}"
            self.steps.append(Step(where, rule.text, did.said or rule.why))
            word, _, target = did.verdict.partition(" ")
            if word == "goto":
                return self._chain(self._chain_called(target))
            if word:
                return word
        return "return"

    def _chain_called(self, name: str) -> Chain:
        return self._chains.get(name) or shape_chain(name, self.family)

    def _rule(self, rule: Rule) -> _Did | None:
        rest, said = rule.text, list[str]()
        while rest:
            for pattern, act in _STATEMENTS:
                if match := pattern.match(rest):
                    did = act(self, match.groups(""))
                    break
            else:
                raise ValueError(f"{rest!r} in {rule.text!r}")
            if did is _NO_MATCH:
                return _NO_MATCH
            said += [did.said] if did.said else []
            if did.verdict:
                return _Did("; ".join(said), did.verdict)
            rest = rest[match.end() :]
        return _Did("; ".join(said))

    def key(self, expression: str) -> str:
        """Return the value of a concatenation, as nft prints it."""
        packet = self.packet
        values = {
            "saddr": str(packet.source),
            "daddr": str(packet.destination),
            "l4proto": packet.protocol.lower(),
            "dport": str(packet.port),
        }
        return " . ".join(values[one.rpartition(" ")[2]] for one in expression.split(" . "))

    def holds(self, container: str, key: str) -> bool:
        """Return whether a set has the element; sets that many share are counted in the program."""
        if container in ("cluster-ips", "hairpin"):
            return Shared(self.family, container, key) in self.shared
        if container != "allowed-sources":
            return (container, key) in self._held
        head = key.rpartition(" . ")[0]
        return any(
            self.packet.source in parse_network(one.rpartition(" . ")[2])
            for name, one in self._held
            if name == container and one.rpartition(" . ")[0] == head
        )

    def value(self, container: str, key: str) -> str:
        """Return the value of an element of a map, or an empty text."""
        value = self._held.get((container, key), "")
        if value:
            self.found.append((container, key))
        return value

    def translate(self, key: str, container: str) -> _Did | None:
        """Become a packet to one of the endpoints of the slots that may have been picked."""
        found = [self.value(container, f"{key} . {slot}") for slot in self.slots]
        self.targets = [one for one in found if one]
        return _Did(f"to {_counted(self.targets)}", "accept") if self.targets else _NO_MATCH

    def reaches_itself(self) -> _Did | None:
        """Masquerade the one endpoint that was the source, if it may be the one that is chosen."""
        protocol = self.packet.protocol.lower()
        for target in sorted(set(self.targets)):
            address, port = target.split(" . ")
            hairpin = f"{address} . {address} . {protocol} . {port}"
            if address == str(self.packet.source) and self.holds("hairpin", hairpin):
                only = len(set(self.targets)) == 1
                return _Did(f"element {hairpin}{'' if only else ', if that endpoint was chosen'}")
        return _NO_MATCH


def _counted(targets: Iterable[str]) -> str:
    slots = Counter(targets)
    named = [
        f"{target} ({count} of {slots.total()} slots)" if slots.total() > len(slots) else target
        for target, count in list(slots.items())[:MOST_TARGETS]
    ]
    more = len(slots) - len(named)
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def _when(holds: Callable[[_Walk, _Groups], bool]) -> Callable[[_Walk, _Groups], _Did | None]:
    return lambda walk, groups: _Did() if holds(walk, groups) else _NO_MATCH


def _mark(walk: _Walk, groups: _Groups) -> _Did:
    walk.marked = groups[0] == "or"
    return _Did("marked for masquerade" if walk.marked else "the mark is cleared")


def _member(walk: _Walk, groups: _Groups) -> _Did | None:
    expression, negated, name = groups
    if name == "hairpin":
        return walk.reaches_itself()
    key = walk.key(expression)
    if walk.holds(name, key) is bool(negated):
        return _NO_MATCH
    return _Did(f"{key} is {'not in it' if negated else 'in it'}")


def _inside(walk: _Walk, groups: _Groups) -> bool:
    word, negated, text = groups
    address = walk.packet.source if word == "saddr" else walk.packet.destination
    ranges = map(parse_network, text.strip("{ }").split(", "))
    return any(address in one for one in ranges) is not bool(negated)


def _interface(walk: _Walk, groups: _Groups) -> bool:
    negated, name = groups
    came = walk.packet.interface
    same = came.startswith(name[:-1]) if name.endswith("*") else came == name
    return same is not bool(negated)


def _vmap(walk: _Walk, groups: _Groups) -> _Did | None:
    key = walk.key(groups[0])
    verdict = walk.value(groups[1], key)
    return _Did(f"element {key} : {verdict}", verdict) if verdict else _NO_MATCH


def _choice(walk: _Walk, groups: _Groups) -> _Did:
    how, count, first = groups[0], int(groups[1]), int(groups[2])
    walk.slots = [classid(number) for number in range(first, first + count)]
    words = {
        "numgen random": f"one of {count} slots by chance",
        "numgen inc": f"the next of {count} slots in turn",
    }
    return _Did(words.get(how, f"one of {count} slots by the hash"))


def _only_slot(walk: _Walk, groups: _Groups) -> _Did:
    if groups[0] == "none":
        return _Did()
    walk.slots = [groups[0]]
    return _Did("the only slot")


def _known_client(walk: _Walk, groups: _Groups) -> _Did:
    walk.found.append((groups[0], str(walk.packet.source)))
    return _Did("a remembered client goes where it was, while that is there; a new one goes on")


def _identity(walk: _Walk, groups: _Groups) -> _Did:
    key = walk.key(groups[0])
    walk.slots = [walk.value(groups[1], f"{key} . {slot}") for slot in walk.slots]
    return _Did("the slot's endpoint, by a number that outlives a change of slots")


_FIELD = r"(?:ip6? [sd]addr|meta l4proto|th dport)"
_KEY = rf"({_FIELD}(?: \. {_FIELD})*)"
_NAME = r"([A-Za-z][A-Za-z0-9/_.-]*)"

_STATEMENTS: tuple[tuple[re.Pattern[str], Callable[[_Walk, _Groups], _Did | None]], ...] = tuple(
    (re.compile(rf"(?:{pattern})(?: |$)"), act)
    for pattern, act in (
        (r"meta l4proto \{ tcp, udp, sctp \}", _when(lambda walk, _: True)),
        (r"meta l4proto tcp tcp flags & \(fin \| syn \| rst \| ack\) != syn",
         _when(lambda walk, _: False)),
        (r"meta l4proto tcp reject with tcp reset",
         lambda walk, _: _Did("refused with a reset", "reject")
         if walk.packet.protocol is Protocol.TCP else _NO_MATCH),
        (r"reject", lambda walk, _: _Did("refused with an ICMP port unreachable", "reject")),
        (r"ct mark set ct mark and 0x[0-9a-f]+ or 0x[0-9a-f]+", _when(lambda walk, _: True)),
        (r"ct mark and 0x[0-9a-f]+ == 0x[0-9a-f]+", _when(lambda walk, _: bool(walk.targets))),
        (r"ct status dnat", _when(lambda walk, _: bool(walk.targets))),
        (r"ct state new", _when(lambda walk, _: True)),
        (r"ct state invalid [^@]* drop", _when(lambda walk, _: False)),
        (r"meta mark set meta mark (or|xor) 0x[0-9a-f]+", _mark),
        (r"meta mark and 0x[0-9a-f]+ == 0x[0-9a-f]+", _when(lambda walk, _: walk.marked)),
        (rf"{_KEY} vmap @{_NAME}", _vmap),
        (r"meta priority set (numgen random|numgen inc) mod ([0-9]+) offset ([0-9]+)", _choice),
        (r"meta priority set (jhash) [^@]+ mod ([0-9]+) seed 0x[0-9a-f]+ offset ([0-9]+)",
         _choice),
        (r"meta priority set (none|[0-9a-f]+:[0-9a-f]+)", _only_slot),
        (rf"meta priority set ip6? saddr map @{_NAME}", _known_client),
        (rf"meta priority set {_KEY} \. meta priority map @{_NAME}", _identity),
        # Only a client that is remembered has a priority here: a new one is followed.
        (r"meta priority != none", _when(lambda walk, _: False)),
        (rf"update @{_NAME} \{{ ip6? saddr timeout ([0-9]+s) : meta priority \}}",
         lambda walk, groups: _Did(f"remembered for {groups[1]} after its last new connection")),
        (rf"dnat ip6? to {_KEY} \. meta priority map @{_NAME}",
         lambda walk, groups: walk.translate(walk.key(groups[0]), groups[1])),
        (r"fib saddr type local", _when(lambda walk, _: walk.packet.from_node)),
        (r"fib daddr type local", _when(lambda walk, _: walk.packet.to_node)),
        (r'iifname (!=)? ?"([^"]+)"', _when(_interface)),
        (rf"{_KEY} (!= )?@{_NAME}", _member),
        (r"ip6? ([sd]addr) (!= )?(\{ [0-9a-f:./, ]+ \}|[0-9a-f:.]+(?:/[0-9]+)?)", _when(_inside)),
        (r"masquerade fully-random", lambda walk, _: _Did("masqueraded", "accept")),
        (r"(goto [A-Za-z0-9/_.-]+|accept|drop|return)",
         lambda walk, groups: _Did(verdict=groups[0])),
    )
)  # fmt: skip
