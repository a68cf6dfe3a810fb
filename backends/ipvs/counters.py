"""What IPVS has counted of every real server.

Lives here: the listing, one virtual server after the other, and whose each is. Must not: add up, or
change anything.
"""

import time
from collections.abc import Collection, Iterator

from vipd.backends.counts import Count, Outcome, Take
from vipd.backends.ipvs.kernel import Kernel
from vipd.backends.ipvs.objects import Service
from vipd.proxy.errors import Busy
from vipd.proxy.names import ServicePortName
from vipd.proxy.virtualserver import Endpoint, Key, VirtualServer


def read(kernel: Kernel, servers: Collection[VirtualServer], take: Take, seconds: float) -> None:
    """Read what real servers of these virtual servers have counted (see Tallying).

    IPVS tells the real servers of one virtual server at a time: 10,000 are 10,000 questions.
    """
    take(_counts(kernel, {one.key: one.owner for one in servers}, time.monotonic() + seconds))


def _counts(kernel: Kernel, owners: dict[Key, ServicePortName], until: float) -> Iterator[Count]:
    for service in kernel.services():
        owner = _owner(owners, service)
        if owner is None:
            continue
        if time.monotonic() > until:
            raise Busy("IPVS: not listed in time")
        told = kernel.usage(service)
        for one in told[1] if told is not None else ():
            at = (service, one.address, one.port)
            endpoint = str(Endpoint(one.address, one.port))
            yield Count(at, owner, endpoint, Outcome.GIVEN, one.total)


def _owner(owners: dict[Key, ServicePortName], service: Service) -> ServicePortName | None:
    """Return whose a service is; one of a node port is at each address of the node."""
    family, protocol, address, port = service
    exact = owners.get(Key(family, address, protocol, port))
    return exact or owners.get(Key(family, None, protocol, port))
