"""What the kernel should show in numbers: rules of each chain and entries of each set of ours.

Lives here: the numbers, counted along with what the kernel was told. Pure. Must not: ask the kernel
(xtables_watching.py). A number that is not known is no alarm: what is found there is taken over.
"""

from collections.abc import Collection, Iterable, Mapping

from vipd.proxy.names import Family

Place = tuple[Family, str]
"""Family and table."""


class Tally:
    """Numbers of one mode: what it observed, and what it was told to change since then."""

    def __init__(self) -> None:
        self.chains: dict[Place, dict[str, int]] = {}
        """Rules by chain; a place that is not in it is not known."""
        self.sets: dict[str, int] = {}
        """Entries by set; a set that is not in it is not known."""

    def observed(self, chains: Mapping[Place, Mapping[str, int]], sets: Mapping[str, int]) -> None:
        """Begin anew from what the kernel has."""
        self.chains = {place: dict(held) for place, held in chains.items()}
        self.sets = dict(sets)

    def wrote(self, place: Place, chains: Mapping[str, int], gone: Iterable[str] = ()) -> None:
        """Note chains that were written as a whole, and such that were removed."""
        held = self.chains.setdefault(place, {})
        for name in gone:
            held.pop(name, None)
        held.update(chains)

    def made_set(self, name: str) -> None:
        """Note that a set is there."""
        self.sets.setdefault(name, 0)

    def added(self, name: str, entries: Collection[str], refused: Collection[str]) -> None:
        """Note entries that were not there and were added, but for the refused ones."""
        if name in self.sets:
            self.sets[name] += len(set(entries)) - len(refused)

    def deleted(self, name: str, entries: Collection[str], refused: Collection[str]) -> None:
        """Note entries that were there and were deleted, but for the refused ones."""
        if name in self.sets:
            self.sets[name] -= len(set(entries)) - len(refused)

    def doubt(self, place: Place) -> None:
        """Note that a table may be otherwise than it was told."""
        self.chains.pop(place, None)

    def doubt_set(self, name: str) -> None:
        """Note that a set may be otherwise than it was told."""
        self.sets.pop(name, None)

    def wrong_chains(self, place: Place, found: Mapping[str, int]) -> list[str]:
        """Return what differs in a table, in words; what was not known is taken over."""
        wanted = self.chains.setdefault(place, dict(found))
        family, table = place
        return [
            f"chain {name} of {family} {table}: {_rules(found.get(name))}, not {count}"
            for name, count in wanted.items()
            if found.get(name) != count
        ]

    def wrong_sets(self, names: Iterable[str], found: Mapping[str, int]) -> list[str]:
        """Return what differs in these sets, in words; what was not known is taken over."""
        wrong = []
        for name in names:
            if name not in self.sets:
                if name in found:
                    self.sets[name] = found[name]
            elif found.get(name) != self.sets[name]:
                wrong.append(f"set {name}: {_entries(found.get(name))}, not {self.sets[name]}")
        return wrong


def _rules(count: int | None) -> str:
    return "is not there" if count is None else f"{count} rules"


def _entries(count: int | None) -> str:
    return "is not there" if count is None else f"{count} entries"
