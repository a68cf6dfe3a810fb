"""nftables objects as values: elements, rules, chains, containers, and how they read as nft text.

Lives here: the types, their spelling and the digest by which a rule is recognised again. Must not:
know services (compile.py) or run nft (driver.py).

Why digests: `nft -j` of 1.0.6 cannot print every statement ("stmt ops map have no json callback"),
so a rule is recognised by the digest of its text in its comment, not by its listing.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from msgspec import Struct

from vipd.proxy.names import Family

TABLE = "vipd"
SKELETON = "vipd-skeleton"
FAMILY_WORD = {Family.IPV4: "ip", Family.IPV6: "ip6"}
FAMILY_OF_WORD = {word: family for family, word in FAMILY_WORD.items()}


class Element(NamedTuple):
    """An element of a set (empty value) or map, as nft text."""

    container: str
    key: str
    value: str


class Rule(Struct, frozen=True):
    """A rule; `why` is told to whoever lists the chain."""

    text: str
    why: str = ""

    @property
    def comment(self) -> str:
        """Return the comment it carries in the kernel: why, and the digest of its text."""
        return f"{self.why} #{digest(self.text)}".strip()


class Chain(Struct, frozen=True):
    """A chain. `hook` is ``type … hook … priority …`` for a base chain, else empty."""

    name: str
    rules: tuple[Rule, ...]
    hook: str = ""

    @property
    def comments(self) -> tuple[str, ...]:
        """Return the comments of its rules: what `observe` compares."""
        return tuple(rule.comment for rule in self.rules)


class Container(Struct, frozen=True):
    """A set or map: `word` is ``set`` or ``map``, `spec` what stands in its braces."""

    word: str
    name: str
    spec: str
    beside: str = ""
    """What else its digest stands for: things that can only be changed by building all anew."""

    @property
    def comment(self) -> str:
        """Return the comment it carries in the kernel: the digest of its declaration."""
        return f"#{digest(self.word + self.spec + self.beside)}"


def digest(text: str) -> str:
    """Return eight hexadecimal digits that stand for the text."""
    return blake2b(text.encode(), digest_size=4).hexdigest()


def declare(family: Family, container: Container, table: str = TABLE) -> str:
    """Return the command that adds the container."""
    where = f"{FAMILY_WORD[family]} {table} {container.name}"
    return f'add {container.word} {where} {{ {container.spec} comment "{container.comment}"; }}'


def declare_chain(family: Family, chain: Chain, table: str = TABLE) -> list[str]:
    """Return the commands that make the chain hold exactly its rules, there or not before."""
    where = f"{FAMILY_WORD[family]} {table} {chain.name}"
    hook = f" {{ {chain.hook}; policy accept; }}" if chain.hook else ""
    return [
        f"add chain {where}{hook}",
        f"flush chain {where}",
        *(f'add rule {where} {rule.text} comment "{rule.comment}"' for rule in chain.rules),
    ]


def elements_command(
    verb: str, family: Family, container: str, texts: Sequence[str], table: str = TABLE
) -> str:
    """Return the command that adds or deletes elements: keys, or ``key : value``."""
    return f"{verb} element {FAMILY_WORD[family]} {table} {container} {{ {', '.join(texts)} }}"
