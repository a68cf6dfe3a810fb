"""Passive health: endpoints that refuse or time out are set aside for a while.

Lives here: who is set aside, until when, and who is on trial. Pure. Must not: probe anything, or
choose; what is known comes from connections that clients wanted.

An endpoint that fails is set aside for FIRST_SECONDS. When that is over, one connection is tried
there: if it fails too, the endpoint is set aside for twice as long as before, up to MOST_SECONDS;
if it succeeds, all is forgotten. A trial of which nothing is heard for TRIAL_SECONDS has succeeded:
the client went away, or it is UDP, where nobody has to answer. (So a connect has to time out
sooner than that.) Failures of connections that were already under way are not held against it.
Never is more than half of a list of endpoints set aside: who fails beyond that stays in.
"""

from collections.abc import Collection, Sequence

from msgspec import Struct

from vipd.backends.userspace.forwarder.balance import Spot, spot_of
from vipd.proxy.virtualserver import Endpoint

FIRST_SECONDS = 1.0
MOST_SECONDS = 60.0
TRIAL_SECONDS = 10.0


class _Aside(Struct):
    seconds: float
    """For how long, the last time."""
    until: float
    """When the next trial may begin, or when silence of this one is success."""
    on_trial: bool = False


class Health:
    """Who of a place's endpoints is set aside. False where nobody is, which is nearly always."""

    def __init__(self) -> None:
        self._lists: Collection[Sequence[Endpoint]] = ()
        self._aside: dict[Spot, _Aside] = {}

    def __bool__(self) -> bool:
        return bool(self._aside)

    def update(self, lists: Collection[Sequence[Endpoint]]) -> None:
        """Take these lists of endpoints, each of which keeps half of its own in use.

        Who is in none of them is forgotten; where a list got shorter, those who would be back
        first are back now.
        """
        self._lists = lists
        if not self._aside:
            return
        spots = [{spot_of(one) for one in listed} for listed in lists]
        self._aside = {
            spot: aside
            for spot, aside in self._aside.items()
            if any(spot in listed for listed in spots)
        }
        for listed in spots:
            there = sorted(listed & self._aside.keys(), key=lambda one: self._aside[one].until)
            for spot in there[: max(0, len(there) - len(listed) // 2)]:
                del self._aside[spot]

    def passed_over(self, now: float) -> set[Spot]:
        """Return who gets no connection now: set aside, or on trial with another connection."""
        over = [spot for spot, one in self._aside.items() if one.on_trial and now >= one.until]
        for spot in over:
            del self._aside[spot]
        return {spot for spot, one in self._aside.items() if now < one.until}

    def chosen(self, spot: Spot, now: float) -> None:
        """Note that a connection goes there: the trial, if one is due."""
        aside = self._aside.get(spot)
        if aside is not None and now >= aside.until:
            aside.on_trial = True
            aside.until = now + TRIAL_SECONDS

    def succeeded(self, spot: Spot) -> None:
        """Note that a connection was established there."""
        aside = self._aside.get(spot)
        # Without a trial it is one from before it was set aside: no news.
        if aside is not None and aside.on_trial:
            del self._aside[spot]

    def failed(self, spot: Spot, now: float) -> None:
        """Note that a connection was refused or timed out there."""
        aside = self._aside.get(spot)
        if aside is not None:
            if not aside.on_trial:
                return
            seconds = min(2 * aside.seconds, MOST_SECONDS)
        elif self._has_room(spot):
            seconds = FIRST_SECONDS
        else:
            return
        self._aside[spot] = _Aside(seconds, now + seconds)

    def until(self, spot: Spot) -> float | None:
        """Return until when it is set aside (or on trial), or None where it is not."""
        aside = self._aside.get(spot)
        return aside.until if aside is not None else None

    def clear(self) -> None:
        """Let everyone back in."""
        self._aside.clear()

    def _has_room(self, spot: Spot) -> bool:
        """Whether one more may be set aside in every list that it stands in; False: in none."""
        found = False
        for listed in self._lists:
            spots = {spot_of(one) for one in listed}
            if spot in spots:
                found = True
                if len(spots & self._aside.keys()) + 1 > len(spots) // 2:
                    return False
        return found
