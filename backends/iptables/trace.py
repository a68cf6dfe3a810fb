"""What one packet meets in the iptables program: `vipd explain`, rule by rule.

Lives here: a reading of the very rules that are loaded, for the first packet of one connection.
Must not: follow chance (a choice among endpoints is one step), nor guess: a rule that it cannot
read is a ValueError, so that a new shape of rule needs a line here.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from vipd.backends.iptables import balance, dispatch
from vipd.backends.iptables.compile import Program, Shared, own_elements, roots
from vipd.backends.iptables.objects import (
    FILTER,
    NAT,
    PROTOCOLS,
    TABLES,
    Chain,
    Element,
    Rule,
)
from vipd.backends.iptables.pipeline import HALVES, INVALID, JUMPS, chains
from vipd.backends.protocol import Packet, Step
from vipd.backends.xtables import PREFIX
from vipd.proxy.names import Family, family_of, parse_network
from vipd.proxy.virtualserver import Key

MOST_TARGETS = 4
"""Endpoints that the step of a choice names; the others are counted."""
ACCEPTED, DROPPED, REFUSED, TRANSLATED = "accepted", "dropped", "refused", "translated"


def trace(program: Program, packet: Packet) -> Sequence[Step]:
    """Return every rule that the packet matches, hook after hook.

    Costs as much as the virtual server that answers, whatever else the program holds.
    """
    return _walk(program, packet).steps


def _walk(program: Program, packet: Packet) -> "Walk":
    walk = Walk(program, packet)
    first = "OUTPUT" if packet.from_node else "PREROUTING"
    walk.hook(NAT, first)
    hooks = ["OUTPUT"] if packet.from_node else []
    if packet.to_node and not walk.targets:
        hooks.append("INPUT")
    elif not packet.from_node:
        hooks.append("FORWARD")
    for hook in hooks:
        if walk.hook(FILTER, hook) in (DROPPED, REFUSED):
            return walk
    if walk.targets or walk.marked:
        walk.hook(NAT, "POSTROUTING")
    return walk


def met(program: Program, packet: Packet) -> Sequence[tuple[str, Chain, int]]:
    """Return the rules of `trace` as (table, chain, place in it); of a choice all that choose."""
    return _walk(program, packet).found


class Walk:
    """A packet on its way.

    `targets` are the endpoints it may have been translated to, with the probability of each;
    `met` counts the rules that it was compared with.
    """

    def __init__(self, program: Program, packet: Packet) -> None:
        self.packet = packet
        self.family = family_of(packet.destination)
        self.steps: list[Step] = []
        self.found: list[tuple[str, Chain, int]] = []
        self.targets: dict[str, Fraction] = {}
        self.marked = False
        self.masqueraded = False
        self.met = 0
        self._shared = program.shared
        self._tables = {
            table: {one.name: one for one in chains(table, program.network, self.family)}
            for table in TABLES
        }
        self._own: set[Element] = set()
        places = (packet.destination, None)
        trees = roots(program.trees[self.family], self.family)
        for address, (node, root, width) in zip(places, trees, strict=True):
            key = Key(self.family, address, packet.protocol, packet.port)
            bits = dispatch.leaf(key, "").bits
            self._add(dispatch.way(node, root, width, bits))
            server = program.servers.get(key)
            if server is not None:
                self._own.update(own_elements(server))
                self._add(balance.chains(server, program.network))

    def hook(self, table: str, chain: str) -> str:
        """Walk what jumps from one of the host's chains to ours; return the verdict, if any.

        The packet is the first of a connection, so it does not meet what is for invalid ones.
        """
        jumps = [one for one in JUMPS if (one.table, one.chain) == (table, chain)]
        for jump in reversed([one for one in jumps if one.to != INVALID]):
            verdict = self._chain(table, self._tables[table][jump.to])
            if verdict:
                return verdict
        return ""

    def _add(self, found: Iterator[Chain] | Sequence[Chain]) -> None:
        self._tables[NAT] |= {one.name: one for one in found}

    def _chain(self, table: str, chain: Chain) -> str:
        """Return what becomes of the packet; an empty text where the chain lets it go on."""
        for number, rule in enumerate(chain.rules):
            self.met += 1
            if (
                "DNAT --to" in rule.target
                or "-m statistic" in rule.match
                or ("-m cluster" in rule.match)
            ):
                return self._choice(chain, chain.rules[number:])
            if not self._matches(rule.match):
                continue
            self.found.append((table, chain, number))
            word, target = rule.target.split(" ", 1)
            verdict, said = self._target(target)
            self._step(table, chain, rule, said)
            if target.startswith(PREFIX):
                result = self._chain(table, self._tables[table][target])
                if result or word == "-g":
                    return result
            elif target == "RETURN":
                return ""
            elif verdict:
                return verdict
        return ""

    def _step(self, table: str, chain: Chain, rule: Rule, said: str) -> None:
        tool = "ip6tables" if self.family is Family.IPV6 else "iptables"
        where = f"{tool} -t {table} {chain.name}"
        self.steps.append(Step(where, rule.text, said or (chain.why if rule.target else "")))

    def _choice(self, chain: Chain, rules: Sequence[Rule]) -> str:
        """Become a packet to one of the endpoints that the chain may choose."""
        remembering = [one for one in rules if "-m recent --update" in one.match]
        if remembering:
            said = "a remembered client goes where it was, while that is there; a new one goes on"
            self._step(NAT, chain, remembering[0], said)
        self.found += [
            (NAT, chain, number)
            for number in range(len(chain.rules) - len(rules), len(chain.rules))
        ]
        self._spread(chain.name, rules, Fraction(1))
        how = next(
            (word for mark, word in _CHOICES if any(mark in one.match for one in rules)),
            "the only one",
        )
        self._step(NAT, chain, rules[len(remembering)], f"{how}: {self._named()}")
        return TRANSLATED if self.targets else ""

    def _spread(self, name: str, rules: Sequence[Rule], chance: Fraction) -> None:
        """Give each endpoint that `rules` lead to its part of a probability."""
        left = chance
        for rule in rules:
            if "-m recent --update" in rule.match:
                continue
            if not _CHOOSING.fullmatch(rule.match):
                raise ValueError(f"{rule.match!r} in {name}")
            found = _HASHED.search(rule.match)
            if found:
                part = chance / int(found[1])
            else:
                part = left * _part(rule.match)
                left -= part
            target = rule.target.rpartition(" ")[2]
            if rule.target.startswith("-g "):
                below = self._tables[NAT][target]
                self.found += [(NAT, below, number) for number in range(len(below.rules))]
                self._spread(target, below.rules, part)
            else:
                self.targets[target] = self.targets.get(target, Fraction(0)) + part

    def _named(self) -> str:
        named = [
            f"{target} ({float(part):.1%})" if len(self.targets) > 1 else target
            for target, part in list(self.targets.items())[:MOST_TARGETS]
        ]
        more = len(self.targets) - len(named)
        return ", ".join(named) + (f" and {more} more" if more > 0 else "")

    def _target(self, target: str) -> tuple[str, str]:
        """Return verdict and words of a target."""
        name, _, options = target.partition(" ")
        match name:
            case "MARK":
                value, _, mask = options.removeprefix("--set-xmark ").partition("/")
                self.marked = value == mask
                if mask == "0x0":
                    return "", "the mark is cleared"
                return "", "marked for masquerade"
            case "CONNMARK":
                return "", "the connection is marked as ours"
            case "MASQUERADE":
                self.masqueraded = True
                return ACCEPTED, "masqueraded"
            case "REJECT":
                return REFUSED, f"refused with {options.rpartition(' ')[2]}"
            case "DROP":
                return DROPPED, "dropped"
            case "ACCEPT":
                return ACCEPTED, ""
            case "RETURN":
                return "", ""
        if name.startswith(PREFIX):
            return "", ""
        raise ValueError(target)

    def _matches(self, text: str) -> bool:
        rest = text
        while rest:
            read = next(
                ((one, holds) for pattern, holds in _MATCHES if (one := pattern.match(rest))), None
            )
            if read is None:
                raise ValueError(f"{rest!r} in {text!r}")
            found, holds = read
            if not holds(self, found.groups("")):
                return False
            rest = rest[found.end() :]
        return True

    def in_set(self, name: str, sides: str) -> bool:
        """Return whether the packet is in a set."""
        packet = self.packet
        port = f"{PROTOCOLS[packet.protocol]}:{packet.port}"
        if name == "HAIRPIN":
            return any(
                Shared(self.family, name, f"{host},{PROTOCOLS[packet.protocol]}:{number},{host}")
                in self._shared
                for host, number in map(_host_and_port, self.targets)
                if host == str(packet.source)
            )
        if sides == "dst":
            return Shared(self.family, name, str(packet.destination)) in self._shared
        if name.startswith("NP-"):
            return Element(name, f"{HALVES[self.family][0]},{port}") in self._own
        place = f"{packet.destination},{port}"
        if sides == "dst,dst":
            return Element(name, place) in self._own
        return any(
            packet.source in parse_network(text.removeprefix(f"{place},"))
            for of, text in self._own
            if of == name
        )


def _part(match: str) -> Fraction:
    chance = re.search(r"--probability ([0-9.]+)", match)
    if chance:
        return Fraction(round(float(chance[1]) * 2**31), 2**31)
    every = re.search(r"--every (\d+) --packet 0", match)
    return Fraction(1, int(every[1])) if every else Fraction(1)


def _host_and_port(target: str) -> tuple[str, str]:
    host, _, port = target.rpartition(":")
    return host.strip("[]"), port


def _interface(walk: Walk, groups: tuple[str, ...]) -> bool:
    came, name = walk.packet.interface, groups[0]
    return came.startswith(name[:-1]) and bool(came) if name.endswith("+") else came == name


def _port(walk: Walk, groups: tuple[str, ...]) -> bool:
    first, last = groups
    return int(first) <= walk.packet.port <= int(last or first)


_CHOICES = (
    ("--mode random", "one by chance"),
    ("--mode nth", "the next in turn"),
    ("-m cluster", "one by the hash of the source"),
)
_CHOOSING = re.compile(
    r"-p (?:tcp|udp|sctp)"
    r"(?: -m statistic --mode (?:random --probability [0-9.]+|nth --every \d+ --packet 0))?"
    r"(?: -m cluster --cluster-total-nodes \d+ --cluster-local-node \d+"
    r" --cluster-hash-seed 0x[0-9a-f]+)?"
    r"(?: -m recent --set --name \S+ --mask \S+ --rsource)?"
)
_HASHED = re.compile(r"--cluster-total-nodes (\d+) --cluster-local-node \d+")

Holds = Callable[[Walk, tuple[str, ...]], bool]
_MATCHES: tuple[tuple[re.Pattern[str], Holds], ...] = tuple(
    (re.compile(rf"(?:{pattern})(?: |$)"), holds)
    for pattern, holds in (
        (r"-p (tcp|udp|sctp)",
         lambda walk, groups: PROTOCOLS[walk.packet.protocol] == groups[0]),
        (r"-m (?:tcp|udp|sctp) --dport (\d+)(?::(\d+))?", _port),
        (r"-m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN", lambda walk, groups: False),
        (r"-d (\S+)", lambda walk, groups: walk.packet.destination in parse_network(groups[0])),
        (r"-s (\S+)", lambda walk, groups: walk.packet.source in parse_network(groups[0])),
        (r"-i (\S+)", _interface),
        (rf"-m set (! )?--match-set {PREFIX}(\S+)-[46] (\S+)",
         lambda walk, groups: walk.in_set(groups[1], groups[2]) is not bool(groups[0])),
        (r"-m conntrack --ctstate NEW", lambda walk, groups: True),
        (r"-m conntrack --ctstate DNAT", lambda walk, groups: bool(walk.targets)),
        (r"-m conntrack --ctstate RELATED,ESTABLISHED", lambda walk, groups: False),
        (r"-m connmark --mark 0x[0-9a-f]+/0x[0-9a-f]+",
         lambda walk, groups: bool(walk.targets)),
        (r"-m mark (! )?--mark 0x[0-9a-f]+/0x[0-9a-f]+",
         lambda walk, groups: walk.marked is not bool(groups[0])),
        (r"-m addrtype --src-type LOCAL", lambda walk, groups: walk.packet.from_node),
        (r"-m addrtype --dst-type LOCAL", lambda walk, groups: walk.packet.to_node),
    )
)  # fmt: skip
