"""Upstreams that know the same names, and who of them is asked first.

Lives here: the choice. Pure; lots are passed in. Must not: ask, or measure (standing.py).
"""

from collections.abc import Sequence

from vipd.dns.forward.settings import Policy
from vipd.dns.forward.standing import Standing
from vipd.dns.forward.wire import RandomBits

AS_FAST_FACTOR = 2.0
AS_FAST_SECONDS = 0.01
"""Who is within twice the fastest's time and 10 ms is as fast: the rest is noise."""
EXPLORE_BITS = 5
"""Once in 32 questions anyone may be the first, for who is never asked is never known."""


class Group:
    """Upstreams in the order of their configuration. Empty: nobody knows."""

    def __init__(
        self, members: Sequence[Standing], policy: Policy, *, refuses_private: bool = False
    ) -> None:
        self.members = tuple(members)
        self.policy = policy
        self.refuses_private = refuses_private
        """Whether private addresses in their replies are dropped."""

    def order(self, bits: RandomBits) -> list[Standing]:
        """Return whom to ask, one after the other: those that are down come last.

        Those that loop or have no room are left out.
        """
        usable = [one for one in self.members if not (one.looping or one.is_full)]
        if len(usable) < 2:
            return usable
        up = [one for one in usable if not one.is_down]
        down = [one for one in usable if one.is_down]
        return self._by_policy(up, bits) + self._by_policy(down, bits)

    def on_trial(self, now: float) -> Standing | None:
        """Return one that was down for long enough to be tried beside another, if there is one."""
        for one in self.members:
            if one.trial_is_due(now) and not (one.looping or one.is_full):
                return one
        return None

    @property
    def is_full(self) -> bool:
        """Whether somebody could be asked, if there were not so many questions under way."""
        usable = [one for one in self.members if not one.looping]
        return bool(usable) and all(one.is_full for one in usable)

    @property
    def all_down(self) -> bool:
        """Whether there is nobody left who answers."""
        return all(one.is_down or one.looping for one in self.members)

    def _by_policy(self, members: list[Standing], bits: RandomBits) -> list[Standing]:
        if self.policy is Policy.IN_ORDER or len(members) < 2:
            return members
        if self.policy is Policy.RANDOM:
            return _shuffled(members, bits)
        return _fastest_first(members, bits)


def _fastest_first(members: list[Standing], bits: RandomBits) -> list[Standing]:
    ordered = sorted(members, key=_time)
    # Time-outs grow with each failure, so one that was fast and is silent falls behind.
    as_fast = _time(ordered[0]) * AS_FAST_FACTOR + AS_FAST_SECONDS
    among = [at for at, one in enumerate(ordered) if _time(one) <= as_fast]
    if bits(EXPLORE_BITS) == 0:
        among = list(range(len(ordered)))
    first = ordered.pop(among[_below(len(among), bits)])
    return [first, *ordered]


def _time(one: Standing) -> float:
    # Those that are not known are tried before those that are known to be slow.
    return 0.0 if one.smoothed is None else one.smoothed * 2**one.failures


def _shuffled(members: list[Standing], bits: RandomBits) -> list[Standing]:
    left, order = list(members), []
    while left:
        order.append(left.pop(_below(len(left), bits)))
    return order


def _below(most: int, bits: RandomBits) -> int:
    """Return a number from 0 below `most`: 32 bits, so that no one is preferred by much."""
    return bits(32) * most >> 32
