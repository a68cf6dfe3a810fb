"""A model of nftables in the kernel: takes nft text and refuses what nft would refuse.

Lives here: transactions, references, elements. What a packet meets is in packets.py. Written from
the manual page of nft, not from the compiler.
"""

import re
from copy import deepcopy
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import TypeVar

from tests.properties.statements import references

from vipd.backends.nftables.objects import SKELETON, TABLE
from vipd.backends.nftables.observed import Observed
from vipd.backends.nftables.pipeline import containers, skeleton
from vipd.proxy.names import Family

FAMILIES = {"ip": Family.IPV4, "ip6": Family.IPV6}
_COMMAND = re.compile(
    r"(add|delete|flush) (table|chain|rule|set|map|element) (ip6?) (\S+)(?: (\S+)(?: (.*))?)?"
)
_HOOK = re.compile(r"\{ (type (?:nat|filter) hook [a-z]+ priority -?[0-9]+); policy accept; \}")
_RULE = re.compile(r'(.*) comment "([^"]{0,128})"')
_DECLARATION = re.compile(r'\{ (.*) comment "([^"]{0,128})"; \}')
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9/_.-]{0,126}")
_VERDICT = re.compile(r"(?:goto|jump) (\S+)|drop|accept")
_TYPE = re.compile(r"type ([a-z_0-9 .]+?)(?: : ([a-z_0-9 .]+?))?;")
T = TypeVar("T")


class Refused(Exception):
    """What nft or the kernel would not take."""


@dataclass
class Chain:
    """A chain: base chains have a hook. Rules are (text, comment)."""

    hook: str = ""
    rules: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Container:
    """A set or map."""

    word: str
    spec: str
    comment: str
    elements: dict[str, str] = field(default_factory=dict)


@dataclass
class Table:
    """A table of one family."""

    chains: dict[str, Chain] = field(default_factory=dict)
    containers: dict[str, Container] = field(default_factory=dict)


class Kernel:
    """The state, changed by transactions that happen wholly or not at all."""

    def __init__(self) -> None:
        self.tables: dict[tuple[Family, str], Table] = {}

    def run(self, text: str) -> None:
        """Do one transaction."""
        before = deepcopy(self.tables)
        try:
            for line in text.splitlines():
                self._line(line)
        except Refused:
            self.tables = before
            raise

    def observed(self) -> Observed:
        """Return what `observe` would find."""
        ours = [(place[0], one) for place, one in self.tables.items() if place[1] == TABLE]
        constant = {(family, one.name) for family in Family for one in containers(family)}
        held = {(f, name): one for f, t in ours for name, one in t.containers.items()}
        chains = {(f, name): one for f, t in ours for name, one in t.chains.items()}
        wanted = [(rule.text, rule.comment) for rule in skeleton().rules]
        return Observed(
            frozenset(self.tables),
            {place: one.comment for place, one in held.items()},
            {place: tuple(comment for _, comment in one.rules) for place, one in chains.items()},
            {place: dict(one.elements) for place, one in held.items() if place in constant},
            frozenset(
                family
                for (family, name), t in self.tables.items()
                if name == SKELETON and "pre" in t.chains and t.chains["pre"].rules == wanted
            ),
        )

    def _line(self, line: str) -> None:
        match = _COMMAND.fullmatch(line)
        if not match:
            raise Refused(f"no command: {line}")
        verb, what, word, table_name, name, rest = match.groups()
        family, rest = FAMILIES[word], (rest or "").strip()
        if what == "table":
            if verb == "add":
                self.tables.setdefault((family, table_name), Table())
            elif self.tables.pop((family, table_name), None) is None:
                raise Refused(f"No such file or directory: {line}")
            return
        table = _need(self.tables, (family, table_name))
        if not _NAME.fullmatch(name):
            raise Refused(f"not a name: {name}")
        match verb, what:
            case ("add", "chain"):
                _add_chain(table, name, rest)
            case ("add", "rule"):
                _add_rule(table, name, rest)
            case ("add", "set" | "map"):
                _add_container(table, what, name, rest)
            case ("add", "element"):
                _add_elements(table, name, rest, family)
            case ("delete", "element"):
                held = _need(table.containers, name).elements
                for text in _listed(rest):
                    if held.pop(text, None) is None:
                        raise Refused(f"No such file or directory: {name} {text}")
            case ("flush", "chain"):
                _need(table.chains, name).rules.clear()
            case ("delete", "chain" | "map"):
                _delete(table, what, name)
            case _:
                raise Refused(f"no command: {line}")


def _need(held: dict[object, T] | dict[str, T] | dict[tuple[Family, str], T], name: object) -> T:
    if name not in held:
        raise Refused(f"No such file or directory: {name}")
    return held[name]  # type: ignore[index]


def _add_chain(table: Table, name: str, rest: str) -> None:
    hook = _HOOK.fullmatch(rest)
    if rest and not hook:
        raise Refused(f"syntax error: {rest}")
    chain = table.chains.setdefault(name, Chain(hook[1] if hook else ""))
    if hook and chain.hook != hook[1]:
        raise Refused(f"Operation not supported: {name} has another hook")


def _add_rule(table: Table, name: str, rest: str) -> None:
    chain = _need(table.chains, name)
    match = _RULE.fullmatch(rest)
    if not match:
        raise Refused(f"syntax error: {rest}")
    text, comment = match.groups()
    used_chains, used_containers = references(text)
    for one in used_chains:
        _need(table.chains, one)
    for one in used_containers:
        _need(table.containers, one)
    chain.rules.append((text, comment))


def _add_container(table: Table, word: str, name: str, rest: str) -> None:
    match = _DECLARATION.fullmatch(rest)
    if not match or not _TYPE.match(match[1]):
        raise Refused(f"syntax error: {rest}")
    made = Container(word, match[1], match[2])
    held = table.containers.setdefault(name, made)
    if (held.word, held.spec) != (made.word, made.spec):
        raise Refused(f"File exists: {name}")


def _listed(rest: str) -> list[str]:
    if not (rest.startswith("{ ") and rest.endswith(" }")):
        raise Refused(f"syntax error: {rest}")
    return rest[2:-2].split(", ")


def _add_elements(table: Table, name: str, rest: str, family: Family) -> None:
    container = _need(table.containers, name)
    key_type, value_type = _types(container)
    for text in _listed(rest):
        key, colon, value = text.partition(" : ")
        if bool(colon) != (container.word == "map"):
            raise Refused(f"syntax error: {text}")
        interval = "flags interval" in container.spec
        _check(key, key_type, family, interval)
        if value_type == "verdict":
            verdict = _VERDICT.fullmatch(value)
            if not verdict:
                raise Refused(f"syntax error: {value}")
            if verdict[1]:
                _need(table.chains, verdict[1])
        elif value_type:
            _check(value, value_type, family, False)
        if container.elements.get(key, value) != value:
            raise Refused(f"File exists: {name} {text}")
        if interval and key not in container.elements:
            _check_overlap(container, key)
        container.elements[key] = value


def _types(container: Container) -> tuple[list[str], str]:
    match = _TYPE.match(container.spec)
    assert match
    return match[1].split(" . "), match[2] or ""


def _check(text: str, types: list[str] | str, family: Family, interval: bool) -> None:
    """Refuse a value that nft would not read, or would print otherwise than it is written."""
    kinds = types.split(" . ") if isinstance(types, str) else types
    parts = text.split(" . ")
    if len(parts) != len(kinds):
        raise Refused(f"syntax error: {text} is no {kinds}")
    for part, kind in zip(parts, kinds, strict=True):
        good = False
        match kind:
            case "ipv4_addr" | "ipv6_addr":
                network = ip_network(part) if interval else ip_network(ip_address(part))
                wide = network.num_addresses > 1
                good = network.version == family == (4 if kind == "ipv4_addr" else 6)
                good &= part == str(network if wide else network.network_address)
            case "inet_proto":
                good = part in ("tcp", "udp", "sctp")
            case "inet_service":
                good = part.isdecimal() and 0 < int(part) < 65536
            case "classid":
                good = bool(
                    re.fullmatch(r"(0|[1-9a-f][0-9a-f]{0,3}):(0|[1-9a-f][0-9a-f]{0,3})", part)
                )
                good &= part not in ("0:0", "ffff:ffff")  # printed as none and root
        if not good:
            raise Refused(f"syntax error: {part} is no {kind}")


def _check_overlap(container: Container, key: str) -> None:
    head, _, last = key.rpartition(" . ")
    for other in container.elements:
        other_head, _, other_last = other.rpartition(" . ")
        if other_head == head and ip_network(last).overlaps(ip_network(other_last)):
            raise Refused(f"File exists: {key} overlaps {other}")


def _delete(table: Table, what: str, name: str) -> None:
    users = [text for chain in table.chains.values() for text, _ in chain.rules]
    if what == "chain":
        _need(table.chains, name)
        used = any(name in references(text)[0] for text in users) or any(
            value.split(" ")[-1] == name
            for one in table.containers.values()
            for value in one.elements.values()
        )
        if not used:
            del table.chains[name]
    else:
        _need(table.containers, name)
        used = any(name in references(text)[1] for text in users)
        if not used:
            del table.containers[name]
    if used:
        raise Refused(f"Device or resource busy: {name}")
