"""What workers have counted, one by one: their sums go down where one ends.

Lives here: reading their reports. Pure. Must not: ask workers (workers.py), or add up.
"""

from collections.abc import Iterable, Iterator, Mapping

from vipd.backends.counts import Count, Outcome
from vipd.backends.userspace import messages
from vipd.backends.userspace.messages import Reported
from vipd.backends.userspace.objects import Place
from vipd.proxy.names import ServicePortName, parse_address
from vipd.proxy.virtualserver import Endpoint, Key


def counts(
    reported: Iterable[Reported],
    where: Mapping[Place, Key],
    owners: Mapping[Key, ServicePortName],
) -> Iterator[Count]:
    """Yield what each worker has counted at each place."""
    for worker in reported:
        for report in worker.places:
            place = messages.place_of(report.place)
            owner = owners.get(where[place]) if place in where else None
            if owner is None:
                continue
            at = (worker.pid, place)
            for one in report.endpoints:
                endpoint = Endpoint(parse_address(one.address), one.port)
                yield Count((*at, endpoint), owner, str(endpoint), Outcome.GIVEN, one.so_far)
            for outcome, number in (
                (Outcome.DENIED, report.denied),
                (Outcome.UNSERVED, report.unserved),
            ):
                yield Count((*at, outcome), owner, "", outcome, number)
