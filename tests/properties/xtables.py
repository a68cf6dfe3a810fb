"""A model of iptables in the kernel, with its ipsets: takes restore's text, and sends packets.

Lives here: tables, chains, and a packet's way through the hooks. What rules mean is in
xtables_rules.py, sets are in ipsets.py. Written from iptables-restore(8) and the kernel, not from
the backends.
"""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction

from tests.properties.chance import Chance, every
from tests.properties.ipsets import IpSets
from tests.properties.kernel import Refused
from tests.properties.oracle import Outcome
from tests.properties.statements import Packet
from tests.properties.xtables_rules import Flight, Memory, NoSuchRule, Rule, parse, words

from vipd.proxy.names import Address, Family

HOOKS = {
    "PREROUTING": ("raw", "mangle", "nat"),
    "INPUT": ("mangle", "filter", "nat"),
    "FORWARD": ("mangle", "filter"),
    "OUTPUT": ("raw", "mangle", "nat", "filter"),
    "POSTROUTING": ("mangle", "nat"),
}
"""Tables of each hook, by priority (-300 raw, -150 mangle, -100 nat before routing, 0 filter, 100
nat after it). Connection tracking begins after raw."""
_BUILT_IN = {
    table: tuple(hook for hook, tables in HOOKS.items() if table in tables)
    for table in ("raw", "mangle", "nat", "filter")
}
_TOOLS = {
    "# iptables-restore --noflush": Family.IPV4,
    "# ip6tables-restore --noflush": Family.IPV6,
}
_NAME_LENGTH = 28
_ENDS = ("DROP", "ACCEPT", "RETURN", "REJECT", "DNAT", "MARK", "CONNMARK", "MASQUERADE")


@dataclass
class Chain:
    """A chain: built-in ones have a policy, and what each rule says after ``-A CHAIN``."""

    policy: str = ""
    rules: list[str] = field(default_factory=list)


Table = dict[str, Chain]


class Xtables:
    """The tables of both families and the sets, changed by restores and commands."""

    def __init__(self) -> None:
        self.sets = IpSets()
        self.tables: dict[tuple[Family, str], Table] = {
            (family, table): {hook: Chain("ACCEPT") for hook in hooks}
            for family in Family
            for table, hooks in _BUILT_IN.items()
        }

    def restore(self, family: Family, text: str, *, checked: bool = True) -> None:
        """Do what ``iptables-restore --noflush`` does: a table at its COMMIT, wholly or not."""
        place: tuple[Family, str] | None = None
        table = _Copied({})
        touched: set[str] = set()
        for line in text.splitlines():
            if not line or line.startswith("#"):
                continue
            if line.startswith("*"):
                place = (family, line[1:])
                if place not in self.tables:
                    raise Refused(f"no table: {line}")
                table = _Copied(self.tables[place])
                touched = set()
            elif place is None:
                raise Refused(f"no table yet: {line}")
            elif line == "COMMIT":
                if checked:
                    self._check(family, place[1], table, touched)
                self.tables[place] = dict(table)
                place = None
            else:
                self._line(place, table, line, touched)
        if place is not None:
            raise Refused("no COMMIT")

    def run(self, text: str, *, checked: bool = True) -> None:
        """Do a plan: commands of ipset, and restores, each with its tool's name in a comment."""
        for _ in self.steps(text, checked=checked):
            pass

    def steps(self, text: str, *, checked: bool = True) -> Iterator[str]:
        """Do a plan and stop after each command of ipset and each table."""
        for family, block in blocks(text):
            if family is not None:
                self.restore(family, block, checked=checked)
                yield block
            else:
                for line in block.splitlines():
                    self.sets.run(line)
                    yield line

    def command(self, family: Family, arguments: str) -> None:
        """Do one ``iptables`` command, from ``-t TABLE`` on."""
        option, table, rest = arguments.split(" ", 2)
        if option != "-t":
            raise Refused(f"no table: {arguments}")
        self.restore(family, f"*{table}\n{rest}\nCOMMIT\n")

    def _line(
        self, place: tuple[Family, str], table: "_Copied", line: str, touched: set[str]
    ) -> None:
        if line.startswith(":"):
            name, policy, *_ = line[1:].split(" ")
            if name in _BUILT_IN[place[1]]:
                table.own(name).policy = policy if policy != "-" else table[name].policy
            elif policy != "-":
                raise Refused(f"policy of a user-defined chain: {line}")
            else:
                table[name] = _named(name)
                touched.add(name)
            return
        verb, name, *more = line.split(" ", 2)
        rest = more[0] if more else ""
        if verb == "-N":
            if name in table:
                raise Refused(f"Chain already exists: {line}")
            table[name] = _named(name)
            return
        if name not in table:
            raise Refused(f"No chain/target/match by that name: {line}")
        chain = table.own(name)
        touched.add(name)
        match verb:
            case "-A":
                chain.rules.append(rest)
            case "-I":
                number, _, text = rest.partition(" ")
                if number.isdecimal():
                    if not 0 < int(number) <= len(chain.rules) + 1:
                        raise Refused(f"Index of insertion too big: {line}")
                    chain.rules.insert(int(number) - 1, text)
                else:
                    chain.rules.insert(0, rest)
            case "-R":
                number, _, text = rest.partition(" ")
                if not 0 < int(number) <= len(chain.rules):
                    raise Refused(f"Index of replacement too big: {line}")
                chain.rules[int(number) - 1] = text
            case "-D" if rest.isdecimal():
                if not 0 < int(rest) <= len(chain.rules):
                    raise Refused(f"Index of deletion too big: {line}")
                del chain.rules[int(rest) - 1]
            case "-D":
                found = [at for at, one in enumerate(chain.rules) if words(one) == words(rest)]
                if not found:
                    raise Refused(f"Bad rule (does a matching rule exist in that chain?): {line}")
                del chain.rules[found[0]]
            case "-F":
                chain.rules.clear()
            case "-X":
                if chain.policy or chain.rules:
                    raise Refused(f"Directory not empty: {line}")
                if any(self._rule(place, one, text).target_name == name
                       for one, held in table.items() for text in held.rules):  # fmt: skip
                    raise Refused(f"Too many links: {line}")
                del table[name]
                touched.discard(name)
            case _:
                raise Refused(f"no command: {line}")

    @staticmethod
    def _rule(place: tuple[Family, str], chain: str, text: str) -> Rule:
        hook = chain if chain in _BUILT_IN[place[1]] else ""
        return parse(text, *place, hook)

    def _check(self, family: Family, name: str, table: Table, touched: Iterable[str]) -> None:
        """Refuse what the kernel would not load: unknown chains and sets, loops."""
        for chain in touched:
            for text in table[chain].rules:
                rule = self._rule((family, name), chain, text)
                if rule.jump and rule.target_name not in table:
                    raise Refused(f"No chain/target/match by that name: {text}")
                if rule.target_name in _BUILT_IN[name]:
                    raise Refused(f"jump to a built-in chain: {text}")
                for one in rule.sets:
                    if one not in self.sets.by_name:
                        raise Refused(f"Set {one} doesn't exist.")
        done: set[str] = set()
        for chain in touched:
            self._descend((family, name), table, chain, (), done)

    def _descend(
        self, place: tuple[Family, str], table: Table, chain: str, path: tuple[str, ...],
        done: set[str],
    ) -> None:  # fmt: skip
        if chain in path:
            raise Refused(f"Too many levels of symbolic links: {path}")
        if chain in done:
            return
        for text in table[chain].rules:
            rule = self._rule(place, chain, text)
            if rule.jump:
                self._descend(place, table, rule.target_name, (*path, chain), done)
        done.add(chain)

    def used_sets(self) -> frozenset[str]:
        """Return the names of sets that rules use."""
        return frozenset(
            one
            for place, table in self.tables.items()
            for chain, held in table.items()
            for text in held.rules
            for one in self._rule(place, chain, text).sets
        )

    def run_hook(self, flight: Flight, hook: str, tables: Iterable[str] | None = None) -> str:
        """Return accept, drop or reject after the tables of a hook."""
        for name in HOOKS[hook] if tables is None else tables:
            flight.hook, flight.table = hook, name
            place = (flight.packet.family, name)
            verdict = self._walk(place, hook, flight)
            if verdict is None or verdict == "return":
                verdict = self.tables[place][hook].policy.lower()
            if verdict != "accept":
                return verdict
        return "accept"

    def _walk(self, place: tuple[Family, str], chain: str, flight: Flight) -> str | None:
        """Return the verdict of a chain, or None at its end and where it returns."""
        for number, text in enumerate(self.tables[place][chain].rules):
            flight.met += 1
            rule = self._rule(place, chain, text)
            if not all(match(flight) for match in rule.matches):
                continue
            flight.path.append((place[1], chain, number))
            verdict = rule.target(flight)
            if rule.jump:
                verdict = self._walk(place, rule.target_name, flight)
                if rule.jump.startswith("-g"):
                    return verdict
            if verdict == "return":
                return None
            if verdict is not None:
                return verdict
        return None


def blocks(text: str) -> Iterator[tuple[Family | None, str]]:
    """Yield what of a plan is told to one run of a tool: a family's restore, or ipset (None)."""
    family: Family | None = None
    block: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("#"):
            if block:
                yield None, "".join(block)
            family, block = _TOOLS[line.strip()], []
            continue
        block.append(line if line.endswith("\n") else f"{line}\n")
        if line.strip() == "COMMIT":
            if family is None:
                raise Refused("no tool said")
            yield family, "".join(block)
            family, block = None, []
    if block:
        yield None, "".join(block)


class _Copied(dict[str, Chain]):
    """A table in a transaction: chains are copied when they are first changed."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self._copied: set[str] = set()

    def own(self, name: str) -> Chain:
        if name not in self._copied:
            self._copied.add(name)
            self[name] = deepcopy(self[name])
        return self[name]

    def __setitem__(self, name: str, chain: Chain) -> None:
        self._copied.add(name)
        super().__setitem__(name, chain)


def _named(name: str) -> Chain:
    if len(name) > _NAME_LENGTH or name in _ENDS:
        raise Refused(f"chain name `{name}' too long (must be under 29 chars)")
    return Chain()


@dataclass(frozen=True)
class Way:
    """One thing that can become of a packet."""

    outcome: Outcome
    probability: Fraction
    met: int
    """Rules met."""
    path: tuple[tuple[str, str, int], ...]
    """Table, chain and number of each rule that held."""
    mark: int
    connection_mark: int
    memory: Memory


def ways(
    kernel: Xtables, packet: Packet, own: frozenset[Address], memory: Memory | None = None
) -> list[Way]:
    """Return everything that can become of the packet; the probabilities add up to 1."""

    def run(chance: Chance) -> tuple[Outcome, Flight]:
        flight = Flight(packet, own, chance, kernel.sets.by_name, deepcopy(memory or {}))
        return _outcome(_travel(kernel, flight), flight), flight

    return [
        Way(
            outcome,
            probability,
            one.met,
            tuple(one.path),
            one.mark,
            one.connection_mark,
            one.memory,
        )
        for (outcome, one), probability in every(run)
    ]


def _outcome(verdict: str, flight: Flight) -> Outcome:
    if verdict != "accept":
        return Outcome(verdict)
    if not flight.translated:
        return Outcome("pass", masqueraded=flight.masqueraded)
    masqueraded = flight.masqueraded and flight.destination not in flight.own
    return Outcome("dnat", f"{flight.destination} . {flight.port}", masqueraded)


def _travel(kernel: Xtables, flight: Flight) -> str:
    if flight.packet.interface:
        verdict = kernel.run_hook(flight, "PREROUTING")
        if verdict != "accept":
            return verdict
        if flight.destination in flight.own:
            return kernel.run_hook(flight, "INPUT")
        verdict = kernel.run_hook(flight, "FORWARD")
    else:
        verdict = kernel.run_hook(flight, "OUTPUT")
    if verdict != "accept":
        return verdict
    verdict = kernel.run_hook(flight, "POSTROUTING")
    if verdict == "accept" and flight.destination in flight.own:
        return arrive_again(kernel, flight)
    return verdict


def arrive_again(kernel: Xtables, flight: Flight) -> str:
    """Let a packet that the node sent to itself come in by its loopback; NAT is decided already."""
    flight.interface = "lo"
    verdict = kernel.run_hook(flight, "PREROUTING", ("raw", "mangle"))
    return kernel.run_hook(flight, "INPUT") if verdict == "accept" else verdict


def state(kernel: Xtables) -> object:
    """Return what there is, to be compared: rules in order, sets with their members."""
    rules = {
        (*place, name): chain.rules
        for place, table in kernel.tables.items()
        for name, chain in table.items()
    }
    return rules, kernel.sets.by_name


__all__ = ["NoSuchRule", "Refused", "Way", "Xtables", "arrive_again", "blocks", "state", "ways"]
