"""iptables objects as values: rules, chains, sets, and how they read as text.

Lives here: the types, the names that kube-proxy's users know, and the digest by which a chain is
recognised again. Must not: know virtual servers (compile.py) or run a tool (driver.py).

Why digests: what iptables-save prints is not what iptables-restore was told (a probability of 1/3
comes back as 0.33333333349), and differs between versions. So the first rule of a chain carries the
digest of the whole chain in its comment, and of the others only what follows ``-j`` or ``-g`` is
compared. A comment for each rule would make the table half as large again: 288 bytes each.
"""

import base64
from functools import lru_cache
from hashlib import blake2b, sha256
from typing import NamedTuple

from msgspec import Struct

from vipd.backends.xtables import PREFIX
from vipd.proxy.names import Family, Protocol
from vipd.proxy.virtualserver import Key

GENERATION = 0x49000000
"""Flows that this dataplane translates carry it in their connection mark ("I")."""
GENERATION_MASK = 0xFF000000
NAT, FILTER = "nat", "filter"
TABLES = (NAT, FILTER)
PROTOCOLS = {Protocol.TCP: "tcp", Protocol.UDP: "udp", Protocol.SCTP: "sctp"}


class Rule(NamedTuple):
    """A rule, without its chain: what it matches, and its ``-j …`` or ``-g …``.

    `key` is the virtual server that the rule is there for, where it stands among those of others.
    """

    match: str
    target: str
    key: Key | None = None

    @property
    def text(self) -> str:
        """Return the rule as iptables-restore is told it, without a comment."""
        return f"{self.match} {self.target}" if self.match else self.target


class Chain(NamedTuple):
    """A chain of ours and its rules; `why` is told to whoever lists it."""

    name: str
    rules: tuple[Rule, ...]
    why: str = ""

    @property
    def digest(self) -> str:
        """Return eight hexadecimal digits that stand for all rules and the comment."""
        text = "\n".join([self.why, *(rule.text for rule in self.rules)])
        return blake2b(text.encode(), digest_size=4).hexdigest()

    @property
    def lines(self) -> list[str]:
        """Return the lines of a restore that fill the chain once it is declared."""
        told = []
        head = f"-A {self.name}"
        for number, (match, target, _) in enumerate(self.rules):
            rule = f"{head} {match}" if match else head
            if not number:
                rule += f' -m comment --comment "{self.comment}"'
            told.append(f"{rule} {target}")
        return told

    @property
    def comment(self) -> str:
        """Return the comment of its first rule: what it is for, and the digest."""
        return f"{self.why} #{self.digest}".strip()

    @property
    def seen(self) -> "Seen":
        """Return what is observed of it where it is there just so."""
        return Seen(self.digest if self.rules else "", tuple(rule.target for rule in self.rules))


class Seen(NamedTuple):
    """What is compared of a chain in the kernel: the digest in its first rule, all targets."""

    digest: str
    targets: tuple[str, ...]


class Jump(Struct, frozen=True):
    """A rule in a chain of the host's that leads to one of ours; inserted at its head."""

    table: str
    chain: str
    match: str
    to: str
    why: str

    @property
    def rule(self) -> str:
        """Return the rule without ``-A`` and chain, as iptables-save prints it."""
        match = f"{self.match} " if self.match else ""
        return f'{match}-m comment --comment "{self.why}" -j {self.to}'


class Element(NamedTuple):
    """An entry of one of our sets, as ipset prints it."""

    set: str
    text: str


class SetKind(NamedTuple):
    """One of our sets: its ipset type, and what it is for."""

    type: str
    why: str


def set_name(name: str, family: Family) -> str:
    """Return the name that a set has in the kernel."""
    return f"{PREFIX}{name}-{int(family)}"


def match_set(name: str, family: Family, sides: str, *, negated: bool = False) -> str:
    """Return the match for packets that are (not) in a set; `sides` such as ``dst,dst``."""
    return f"-m set {'! ' if negated else ''}--match-set {set_name(name, family)} {sides}"


@lru_cache(maxsize=1 << 16)
def hashed(prefix: str, text: str) -> str:
    """Return a chain's name as kube-proxy makes them: prefix and 16 letters of base32(sha256)."""
    digest = sha256(text.encode()).digest()
    return f"{PREFIX}{prefix}-{base64.b32encode(digest)[:16].decode()}"
