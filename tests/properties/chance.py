"""Chance in packet models: every way that a packet can go, each with its exact probability.

Lives here: the replay of choices. Must not: know packets.
"""

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import TypeVar

T = TypeVar("T")


class Chance:
    """The choices of one run: those on the path as it says, the first possible one after that."""

    def __init__(self, path: list[int]) -> None:
        self.path = path
        self.widths: list[int] = []
        self.weight = Fraction(1)

    def pick(self, shares: Mapping[T, Fraction]) -> T:
        """Return one of those with a share; the shares add up to 1."""
        assert sum(shares.values()) == 1, shares
        possible = [(one, share) for one, share in shares.items() if share]
        place = len(self.widths)
        self.widths.append(len(possible))
        if place == len(self.path):
            self.path.append(0)
        one, share = possible[self.path[place]]
        self.weight *= share
        return one

    def happens(self, probability: Fraction) -> bool:
        """Return whether something of this probability happens."""
        return self.pick({True: probability, False: 1 - probability})


def every(run: Callable[[Chance], T]) -> Iterator[tuple[T, Fraction]]:
    """Run again and again until every choice was made, and yield results with probabilities."""
    path: list[int] = []
    while True:
        chance = Chance(path)
        yield run(chance), chance.weight
        widths = chance.widths
        del path[len(widths) :]
        while path and path[-1] + 1 == widths[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1
