"""Connections of each service and endpoint, added up from what dataplanes count.

Lives here: sums that go on where a counter begins anew, or another mode serves; and how many
services and endpoints are told apart. Pure. Must not: read counters (counters.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable

from vipd.backends.counts import Count, Outcome
from vipd.proxy.names import NamespacedName, Protocol, ServicePortName
from vipd.proxy.virtualserver import Table

MOST_SERVICES = 2_000
"""Service ports that are told apart, those first that have a connection first."""
MOST_ENDPOINTS = 10_000
"""Endpoints that are told apart, each once for each service port."""
OTHERS = ServicePortName(NamespacedName("", "(others)"), "", Protocol.TCP)
"""Stands for all services beyond, and no service can be called so; its protocol means nothing."""

MOST_KNOWN = 1_000_000
"""Counters that are remembered beyond those of a complete reading."""

Add = Callable[[ServicePortName, str, Outcome, int], None]


class Known:
    """What each counter of a mode said when it was read last, by the hash of what tells it apart.

    A listing can pass over something while something else is changed, so what is `missing` from
    one reading is remembered for one more.
    """

    def __init__(self, last: dict[int, int], missing: dict[int, int]) -> None:
        self.last, self.missing = last, missing


class Reading:
    """One reading of all counters of a mode; `add` is told what has come since the one before.

    `settle` is called when all of them were read.
    """

    def __init__(self, known: Known, add: Add, settle: Callable[[], None]) -> None:
        self._known = known
        self._add, self._settle = add, settle
        self._now: dict[int, int] = {}

    def take(self, counts: Iterable[Count]) -> None:
        """Take some of the counters. What `counts` raises is raised."""
        now, last, missing = self._now, self._known.last, self._known.missing
        for at, owner, endpoint, outcome, number in counts:
            which = hash(at)
            before = now.get(which)
            if before is None:
                before = last.get(which)
            if before is None:
                before = missing.get(which, 0)
            now[which] = number
            # Lower: its object was made anew, and began at 0.
            more = number - before if number >= before else number
            if more:
                self._add(owner, endpoint, outcome, more)

    def done(self) -> None:
        """Say that these were all."""
        last, now = self._known.last, self._now
        self._known.missing = {one: number for one, number in last.items() if one not in now}
        self._known.last = now
        self._settle()

    def broken_off(self) -> None:
        """Say that not all were read: the others are as they were."""
        self._known.last.update(self._now)
        if len(self._known.last) > MOST_KNOWN:
            self._known.last = self._now


class Connections:
    """Sums since the first reading: they rise, as long as their service and endpoint are there."""

    def __init__(
        self, most_services: int = MOST_SERVICES, most_endpoints: int = MOST_ENDPOINTS
    ) -> None:
        self.services: dict[ServicePortName, Counter[Outcome]] = {}
        self.endpoints: dict[tuple[ServicePortName, str], int] = {}
        self._most_services, self._most_endpoints = most_services, most_endpoints
        self._turned_away: dict[ServicePortName, int] = {}
        """Those of whom one list of the kernel says that they asked, and no other one that they
        were admitted: the most that it ever was."""
        self._known: dict[str, Known] = {}
        self._table: Table | None = None

    def reading(self, mode: str) -> "Reading":
        """Begin a reading of all counters of a mode."""
        return Reading(self._known.setdefault(mode, Known({}, {})), self._add, self._settle)

    def keep(self, table: Table) -> None:
        """Forget services and endpoints that are not in the table."""
        if table is self._table:
            return
        self._table = table
        there: dict[NamespacedName, dict[ServicePortName, set[str]]] = {}
        for name in {owner.service for owner in self.services}:
            ports = there.setdefault(name, {})
            for server in table.by_service.get(name, ()):
                endpoints = ports.setdefault(server.owner, set())
                endpoints.update(str(one) for one in (*server.cluster, *server.local))
        nothing: dict[ServicePortName, set[str]] = {}
        self.services = {
            owner: counts
            for owner, counts in self.services.items()
            if owner is OTHERS or owner in there.get(owner.service, nothing)
        }
        self._turned_away = {
            owner: number for owner, number in self._turned_away.items() if owner in self.services
        }
        self.endpoints = {
            (owner, endpoint): number
            for (owner, endpoint), number in self.endpoints.items()
            if owner is OTHERS or endpoint in there.get(owner.service, nothing).get(owner, ())
        }

    def denied(self, owner: ServicePortName) -> int:
        """Return the attempts from sources that are not allowed, as of the last whole reading."""
        told = self.services.get(owner, Counter())
        return told[Outcome.DENIED] + self._turned_away.get(owner, 0)

    def _settle(self) -> None:
        """Note who was turned away.

        The kernel lists who asked first, and who was admitted after that. Connections that come in
        between make the difference too small, never too large.
        """
        for owner, told in self.services.items():
            number = told[Outcome.ASKED] - told[Outcome.ADMITTED]
            if number > self._turned_away.get(owner, 0):
                self._turned_away[owner] = number

    def _add(self, owner: ServicePortName, endpoint: str, outcome: Outcome, number: int) -> None:
        if owner not in self.services and len(self.services) >= self._most_services:
            owner = OTHERS
        self.services.setdefault(owner, Counter())[outcome] += number
        if not endpoint:
            return
        place = (owner, endpoint)
        if owner is OTHERS or (
            place not in self.endpoints and len(self.endpoints) >= self._most_endpoints
        ):
            place = (OTHERS, "")
        self.endpoints[place] = self.endpoints.get(place, 0) + number
