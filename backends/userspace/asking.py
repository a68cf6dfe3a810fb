"""What workers are asked, one by one, and their answers put together.

Lives here: what is open, served and counted over some workers. Must not: change anything of them.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from vipd.backends.usage import Silent
from vipd.backends.userspace import messages
from vipd.backends.userspace.messages import Count, Counted, Reported, Tell, Told
from vipd.backends.userspace.objects import Place
from vipd.backends.userspace.worker import Worker
from vipd.proxy.errors import DataplaneError


async def opened(workers: Iterable[Worker]) -> Counter[Place]:
    """Return how many connections and sessions are open at each place."""
    found: Counter[Place] = Counter()
    for worker in workers:
        try:
            answer, _ = await worker.ask(Count())
        except DataplaneError:
            continue  # it ended, and what was open with it
        if isinstance(answer, Counted):
            found.update({messages.place_of(place): count for place, count in answer.open})
    return found


async def reports(workers: Iterable[Worker]) -> list[Told]:
    """Return what each worker says of itself. Raise DataplaneError where one that serves does not.

    One that is deaf is killed, and one that is retired serves nobody new: it is left out.
    """
    found = []
    for worker in workers:
        try:
            answer, _ = await worker.ask(Tell())
        except DataplaneError:
            if not worker.retired:
                raise
            continue
        if isinstance(answer, Told):
            found.append(answer)
    return found


async def counted(
    workers: Sequence[Worker], where: Collection[Place], client: str
) -> tuple[list[Reported], tuple[Silent, ...]]:
    """Return what each worker has counted at places, and there of one client, and who was silent.

    Whoever does not answer keeps nobody from hearing the others.
    """
    asked = (one.report(where, client) for one in workers)
    told = await asyncio.gather(*asked, return_exceptions=True)
    found: list[Reported] = []
    silent: list[Silent] = []
    for worker, each in zip(workers, told, strict=True):
        if isinstance(each, DataplaneError | TimeoutError):
            silent.append(Silent(worker.number, worker.pid))
        elif isinstance(each, BaseException):
            raise each
        else:
            found += each
    return found, tuple(silent)
