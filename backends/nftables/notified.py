"""What the kernel tells of changes to its nftables: who changed what of ours.

Lives here: the messages of nfnetlink's group for nftables, read. Must not: receive them
(watching.py). Source: net/netfilter/nf_tables_api.c, Linux 6.1: nf_tables_commit sends one message
for each object, many in a datagram, and after them all one that says who it was (NEWGEN).
"""

import struct
from collections.abc import Iterator, Sequence

from msgspec import Struct

from vipd.backends.nftables.objects import FAMILY_WORD, SKELETON
from vipd.proxy.names import Family

MOST_TOLD = 8
"""Changes of one transaction that are told by name."""
MOST_READ = 256
"""Datagrams of one transaction that are read to the end; of more, only the beginning of each. It is
our own cold start then, or the whole table is gone anyhow."""

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_NEWGEN = 15
_VERBS = {
    0: "table added",
    2: "table deleted",
    3: "chain added",
    5: "chain deleted",
    6: "rule added to",
    8: "rule deleted from",
    9: "set added",
    11: "set deleted",
    12: "element added to",
    14: "element deleted from",
    18: "object added",
    20: "object deleted",
    22: "flowtable added",
    24: "flowtable deleted",
}
_RULE_DELETED = 8
_ABOUT_CHAINS = ("table ", "chain ", "rule ")
_PROCESS, _NAME = 2, 3
_FAMILIES = {1: "inet", 2: FAMILY_WORD[Family.IPV4], 10: FAMILY_WORD[Family.IPV6]}
MOST_BESIDE = 32
"""Chains of the host's that are remembered of one transaction; there are a dozen that matter."""

TableName = tuple[str, str]
"""Family word and name of a table."""
SKELETONS = frozenset((word, SKELETON) for word in FAMILY_WORD.values())


class Ours(Struct, frozen=True):
    """What of nftables is ours.

    `tables` are ours as a whole. In the tables `shared`, chains are ours whose names begin with
    `prefix`, and rules of other chains may lead to them.
    """

    tables: frozenset[TableName]
    shared: frozenset[TableName] = frozenset()
    prefix: str = ""


class Transaction(Struct, frozen=True):
    """A change that was committed, as far as what is ours goes."""

    port: int
    """Of the netlink socket: as a rule the process id, as the process itself sees it."""
    process: int
    """Its id as the kernel counts, which is another one inside a container."""
    name: str
    touched: tuple[str, ...]
    """What of ours it changed."""
    beside: tuple[tuple[str, str, str], ...] = ()
    """Chains of others in shared tables that lost a rule: family word, table, chain. Newer kernels
    do not tell which rule it was (nf_tables_fill_rule_info, 6.3)."""


class Notified:
    """Puts messages together to transactions."""

    def __init__(self, ours: Ours) -> None:
        self._ours = ours
        self._touched: dict[str, None] = {}
        self._beside: dict[tuple[str, str, str], None] = {}
        self._datagrams = 0

    def feed(self, datagram: bytes) -> Iterator[Transaction]:
        """Yield the transactions that end in this datagram. No bytes make it raise."""
        self._datagrams += 1
        for kind, port, family, attributes in _messages(datagram):
            if kind == _NEWGEN:
                found = dict(_attributes(attributes))
                yield Transaction(
                    port,
                    _number(found.get(_PROCESS, b"")),
                    _text(found.get(_NAME, b"")),
                    tuple(self._touched),
                    tuple(self._beside),
                )
                self.lost()
                continue
            if kind in _VERBS:
                self._note(kind, family, attributes)
            if self._datagrams > MOST_READ or len(self._touched) >= MOST_TOLD:
                break  # NEWGEN has a datagram of its own (nf_tables_gen_notify)

    def lost(self) -> None:
        """Note that datagrams were lost: what was put together so far is of no use."""
        self._touched, self._beside, self._datagrams = {}, {}, 0

    def _note(self, kind: int, family: str, attributes: bytes) -> None:
        """Remember a change of ours. The first two attributes are the names.

        They are in every message of this kind (nf_tables_fill_*_info put them first).
        """
        if len(self._touched) >= MOST_TOLD:
            return
        texts = [_text(value) for _, value in _first_two(attributes)]
        if not texts:
            return
        ours, table = self._ours, (family, texts[0])
        verb = _VERBS[kind]
        if table in ours.tables:
            names = texts[:1] if verb.startswith("table") else texts
            self._touched[f"{verb} {family} {' '.join(names)}"] = None
        elif table in ours.shared and len(texts) == 2 and not verb.startswith("table"):
            if texts[1].startswith(ours.prefix):
                self._touched[f"{verb} {family} {' '.join(texts)}"] = None
            elif kind == _RULE_DELETED and len(self._beside) < MOST_BESIDE:
                self._beside[family, texts[0], texts[1]] = None


def may_concern_chains(touched: Sequence[str]) -> bool:
    """Return whether a transaction that touched this may have changed tables, chains or rules.

    One of which not everything is told may have. What was lost may have, too, but our own commits
    are what makes notifications get lost: that proves nothing against chains.
    """
    return len(touched) >= MOST_TOLD or any(one.startswith(_ABOUT_CHAINS) for one in touched)


def _messages(datagram: bytes) -> Iterator[tuple[int, int, str, bytes]]:
    """Yield number, port, family word and attributes of each nftables message."""
    offset = 0
    while offset + 20 <= len(datagram):
        length, kind, _, _, port = _HEADER.unpack_from(datagram, offset)
        if length < 20 or offset + length > len(datagram):
            return
        if kind >> 8 == _SUBSYSTEM:
            family = _FAMILIES.get(datagram[offset + 16], "other")
            yield kind & 0xFF, port, family, datagram[offset + 20 : offset + length]
        offset += (length + 3) & ~3


def _attributes(text: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(text):
        length, kind = _ATTRIBUTE.unpack_from(text, offset)
        if length < 4 or offset + length > len(text):
            return
        yield kind & 0x3FFF, text[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _first_two(text: bytes) -> Iterator[tuple[int, bytes]]:
    for number, one in enumerate(_attributes(text)):
        if number == 2:
            return
        yield one


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big") if len(value) == 4 else 0


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
