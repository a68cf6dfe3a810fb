"""What nftables has, asked of the kernel itself: tables, chains, rules, comments, elements.

Lives here: those listings. `nft list tables` reads the whole rule set first: 0.4 s and 70 MB
with 70,000 elements (nft 1.0.6), where this is one answer of some hundred bytes.
Source: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h, Linux 6.1.
"""

import errno
import struct
from hashlib import blake2b
from typing import NamedTuple

from vipd.backends import netlink
from vipd.backends.netlink import DUMP, HEADER, REQUEST, attribute, attributes
from vipd.backends.nftables import raw
from vipd.backends.nftables.raw import Held
from vipd.proxy.errors import DataplaneError, OutOfStep, Unsupported

_GET_TABLE = 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_GET_RULE = 10 << 8 | 7  # NFT_MSG_GETRULE
_GET_CHAIN = 10 << 8 | 4  # NFT_MSG_GETCHAIN
_NAME, _FLAGS, _TABLE_HANDLE = 1, 2, 4  # NFTA_TABLE_*, NFTA_EXPR_NAME
_DORMANT = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
"""enum nf_inet_hooks."""
_RULE_HANDLE, _RULE_EXPRESSIONS = 3, 4
_DATA, _COUNTER = 2, b"counter\0"  # NFTA_EXPR_DATA
_GET_SET = 10 << 8 | 10  # NFT_MSG_GETSET
_RULE_TABLE, _RULE_CHAIN, _RULE_DATA = 1, 2, 7
_SET_TABLE, _SET_NAME, _SET_DATA = 1, 2, 13
_RULE_COMMENT, _SET_COMMENT = 0, 7
"""In what nft stores beside rules and sets (libnftnl/udata.h)."""
_GENERAL = 20
_ANY_FAMILY = struct.pack("=BBH", 0, 0, 0)
_WORDS = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_NUMBERS = {word: number for number, word in _WORDS.items()}
_NO_NF_TABLES = (errno.EOPNOTSUPP, errno.EINVAL, errno.EPROTONOSUPPORT, errno.ENOENT)


class SeenTable(NamedTuple):
    """A table: its handle, which no other had before or has later, and whether it sleeps."""

    handle: bytes
    is_dormant: bool


class Base(NamedTuple):
    """What makes a chain a base chain: its hook, as `Chain.hook` has it, and its policy."""

    hook: str
    accepts: bool


class SeenRule(NamedTuple):
    """A rule: its comment, and what tells it from any other in its place."""

    comment: str
    identity: bytes
    """Its handle and a digest of its expressions: a rule that is replaced by another has a new
    handle up to some Linux, in 6.18 the same."""


def listed() -> set[tuple[str, str]]:
    """Return every table: (family word as nft has it, name). Raise DataplaneError."""
    return set(seen())


def seen() -> dict[tuple[str, str], SeenTable]:
    """Return every table by family word as nft has it, and name. Raise DataplaneError."""
    asking = HEADER.pack(HEADER.size + len(_ANY_FAMILY), _GET_TABLE, REQUEST | DUMP, 0, 0)
    try:
        with netlink.netfilter() as socket:
            answers = socket.ask(asking + _ANY_FAMILY)
    except (OSError, DataplaneError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NO_NF_TABLES:
            raise Unsupported("nf_tables", "a kernel with nf_tables") from error
        raise
    return dict(map(_table, answers))


def rules(word: str, table: str, chain: str) -> list[bytes]:
    """Return the rules of a chain as the kernel tells them; none where there is no such chain.

    Raise DataplaneError.
    """
    chosen = attribute(_RULE_TABLE, f"{table}\0".encode())
    return _dumped(_GET_RULE, word, chosen + attribute(_RULE_CHAIN, f"{chain}\0".encode()))


def rules_of_chains(word: str, table: str) -> dict[str, tuple[SeenRule, ...]]:
    """Return the rules of each chain of a table; chains without rules are not in it.

    Raise DataplaneError.
    """
    found: dict[str, list[SeenRule]] = {}
    for answer in _dumped(_GET_RULE, word, attribute(_RULE_TABLE, f"{table}\0".encode())):
        told = dict(attributes(answer, _GENERAL))
        if _text(told.get(_RULE_TABLE, b"")) == table:
            comment = _comment(told.get(_RULE_DATA, b""), _RULE_COMMENT)
            chain = found.setdefault(_text(told.get(_RULE_CHAIN, b"")), [])
            chain.append(SeenRule(comment, _identity(told)))
    return {name: tuple(rules) for name, rules in found.items()}


def _identity(told: dict[int, bytes]) -> bytes:
    body = told.get(_RULE_EXPRESSIONS, b"")
    if _COUNTER in body:  # what it has counted is no part of it
        expressions = (dict(attributes(one, 0)) for _, one in attributes(body, 0))
        body = b"".join(
            one.get(_NAME, b"") + (b"" if one.get(_NAME) == _COUNTER else one.get(_DATA, b""))
            for one in expressions
        )
    return told.get(_RULE_HANDLE, b"") + blake2b(body, digest_size=8).digest()


def chains(word: str, table: str) -> dict[str, Base | None]:
    """Return the chains of a table; None for one that is no base chain. Raise DataplaneError."""
    found = {}
    for answer in _dumped(_GET_CHAIN, word, attribute(_CHAIN_TABLE, f"{table}\0".encode())):
        told = dict(attributes(answer, _GENERAL))
        if _text(told.get(_CHAIN_TABLE, b"")) == table:
            found[_text(told.get(_CHAIN_NAME, b""))] = _base(told)
    return found


def _base(told: dict[int, bytes]) -> Base | None:
    if _CHAIN_HOOK not in told:
        return None
    inside = dict(attributes(told[_CHAIN_HOOK], 0))
    number = int.from_bytes(inside.get(_HOOK_NUMBER, b""))
    hook = _HOOKS[number] if number < len(_HOOKS) else str(number)
    priority = int.from_bytes(inside.get(_HOOK_PRIORITY, b""), signed=True)
    kind = _text(told.get(_CHAIN_TYPE, b""))
    accepts = int.from_bytes(told.get(_CHAIN_POLICY, b"")) == 1  # NF_ACCEPT
    return Base(f"type {kind} hook {hook} priority {priority}", accepts)


def comments_of_sets(word: str, table: str) -> dict[str, str]:
    """Return the comments of the named sets and maps of a table. Raise DataplaneError."""
    found = {}
    for answer in _dumped(_GET_SET, word, attribute(_SET_TABLE, f"{table}\0".encode())):
        told = dict(attributes(answer, _GENERAL))
        if _text(told.get(_SET_TABLE, b"")) == table:
            found[_text(told.get(_SET_NAME, b""))] = _comment(
                told.get(_SET_DATA, b""), _SET_COMMENT
            )
    return found


def elements(family: int, table: str, container: str) -> Held:
    """Return the elements of a set or map; none where there is no such. Raise DataplaneError."""
    try:
        with netlink.netfilter() as socket:
            return raw.held(socket.ask(raw.listing(family, table, container)))
    except OutOfStep:
        return {}


def _dumped(asked: int, word: str, said: bytes) -> list[bytes]:
    said = struct.pack("=BBH", _NUMBERS[word], 0, 0) + said
    asking = HEADER.pack(HEADER.size + len(said), asked, REQUEST | DUMP, 0, 0) + said
    try:
        with netlink.netfilter() as socket:
            return socket.ask(asking)
    except OutOfStep:
        return []


def _comment(data: bytes, wanted: int) -> str:
    """Return the comment in what nft has stored beside a rule or set: type, length, value."""
    at = 0
    while at + 2 <= len(data):
        kind, length = data[at], data[at + 1]
        if kind == wanted:
            return _text(data[at + 2 : at + 2 + length])
        at += 2 + length
    return ""


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _table(answer: bytes) -> tuple[tuple[str, str], SeenTable]:
    family = answer[HEADER.size]
    told = dict(attributes(answer, _GENERAL))
    is_dormant = bool(int.from_bytes(told.get(_FLAGS, b"")) & _DORMANT)
    name = _WORDS.get(family, str(family)), _text(told.get(_NAME, b""))
    return name, SeenTable(told.get(_TABLE_HANDLE, b""), is_dormant)
