"""Chains as the kernel has them, against those that it should have.

Lives here: that comparison, and what it goes by where comments say nothing: how the rules were that
were seen in good order. Must not: know which chains there should be (mending.py, skeleton.py), or
run nft.

The comment of a rule is ours, and somebody can replace the rule and keep it. What the kernel makes
of a rule's text is nft's secret, so what it had when nobody had changed it is remembered.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vipd.backends.nftables import tables
from vipd.backends.nftables.objects import FAMILY_WORD, Chain, declare_chain
from vipd.backends.nftables.tables import Base, SeenRule, SeenTable
from vipd.proxy.names import Family

Identities = tuple[bytes, ...]
"""Of a table (its handle) and of the rules of one of its chains."""


Place = tuple[str, str, str]
"""Family word, table and name of a chain."""


class ChainRepair(NamedTuple):
    """Commands for nft, and the chains that they write."""

    lines: list[str]
    written: list[Place]


class ChainNotes:
    """The rules of our chains as they were when nobody else had changed them."""

    def __init__(self) -> None:
        self._seen: dict[Place, Identities] = {}
        self._put_right: set[Place] = set()
        """Written again because somebody had changed something, and not seen since."""

    def note(self, family: Family, table: str) -> None:
        """Note the rules of a table that was just written. Raise DataplaneError."""
        word = FAMILY_WORD[family]
        of_table = tables.seen().get((word, table))
        if of_table is not None:
            for name, rules in tables.rules_of_chains(word, table).items():
                self._seen[word, table, name] = _identities(of_table, rules)

    def forget(self, chains: Iterable[Place]) -> None:
        """Forget chains that were written again by ourselves."""
        for one in chains:
            self._seen.pop(one, None)
            self._put_right.discard(one)

    def forget_all(self) -> None:
        """Forget everything: the tables are built anew."""
        self._seen.clear()
        self._put_right.clear()

    def put_right(self, chains: Iterable[Place]) -> None:
        """Forget chains that were written again as `repair` said.

        They are taken as they are when they are seen next, whoever is told to have written: where
        `nft` is a script, what it starts is not known for ours, and would be repaired for ever.
        """
        for one in chains:
            self._seen.pop(one, None)
            self._put_right.add(one)

    def repair(
        self, family: Family, table: str, wanted: Sequence[Chain], *, is_suspect: bool = False
    ) -> ChainRepair:
        """Return what makes the table have these chains, and no other on a hook.

        Chains that are in good order are noted. Where somebody is known to have changed something
        (`is_suspect`), those that never were noted are written again. Whoever does what is returned
        says so by `put_right`. Raise DataplaneError.
        """
        word = FAMILY_WORD[family]
        of_table = tables.seen().get((word, table))
        if of_table is None:
            lines = [line for one in wanted for line in declare_chain(family, one, table)]
            return ChainRepair(lines, [(word, table, one.name) for one in wanted])
        there, rules = tables.chains(word, table), tables.rules_of_chains(word, table)
        lines = [f"add table {word} {table}"] if of_table.is_dormant else []  # wakes it
        strange = there.keys() - {one.name for one in wanted}
        for name in sorted(one for one in strange if there[one] is not None):
            lines += _deletion(f"{word} {table} {name}")
        written = []
        for one in wanted:
            place = word, table, one.name
            found = rules.get(one.name, ())
            now = _identities(of_table, found)
            doubted = is_suspect and place not in self._put_right
            known = self._seen.get(place, None if doubted else now)
            if known == now and _is_right(one, there, found):
                self._seen[place] = now
                self._put_right.discard(place)
                continue
            base = there.get(one.name)
            if one.name in there and (base and base.hook) != (one.hook or None):
                lines += _deletion(f"{word} {table} {one.name}")
            lines += declare_chain(family, one, table)
            written.append(place)
        return ChainRepair(lines, written)


def _identities(table: SeenTable, rules: Sequence[SeenRule]) -> Identities:
    return table.handle, *(rule.identity for rule in rules)


def _is_right(wanted: Chain, there: dict[str, Base | None], rules: tuple[SeenRule, ...]) -> bool:
    base = Base(wanted.hook, accepts=True) if wanted.hook else None
    if wanted.name not in there or there[wanted.name] != base:
        return False
    return tuple(rule.comment for rule in rules) == wanted.comments


def _deletion(chain: str) -> list[str]:
    return [f"flush chain {chain}", f"delete chain {chain}"]
