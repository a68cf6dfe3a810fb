"""Watching the services of IPVS: looked at, for the kernel tells nobody of changes.

Lives here: how many real servers each service of ours has, and when that is compared with the
kernel. Must not: know why there are so many (plan.py). The generic netlink family of IPVS has no
multicast group (net/netfilter/ipvs/ip_vs_ctl.c, Linux 6.18). Twice a second the number of services
is asked; where it is another one than before, and every now and then, services and real servers are
counted. A weight that somebody changed is found by comparing only.
"""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping

from vipd.backends.ipvs.kernel import Kernel
from vipd.backends.ipvs.messages import Counted
from vipd.backends.ipvs.objects import ADD, DELETE, Destination, Operation, Service, Thing
from vipd.backends.watching import Drift

LOOK_SECONDS = 0.5
REST = 50.0
"""After a count, another follows after so many times what it took: 2 % of a processor at most,"""
LONG_REST, LONGEST_SECONDS = 1000.0, 10.0
"""and 0.1 % where the number of services stays: real servers alone may have changed."""
MOST_TOLD = 8
_GET_INFO = 64 + 1024 + 64 + 1  # IP_VS_SO_GET_INFO (include/uapi/linux/ip_vs.h)
_INFO = struct.Struct("=III")  # version, size of the connection table, number of services


class Services:
    """The services of ours with the number of their real servers, as the kernel was told them."""

    def __init__(self) -> None:
        self._held: dict[Service, int] | None = None
        self._is_doubted = False

    def observed(self, things: Iterable[Thing]) -> None:
        """Begin anew from what the kernel has of ours."""
        self._held, self._is_doubted = {}, False
        for one in things:
            if isinstance(one, Service):
                self._held.setdefault(one, 0)
            elif isinstance(one, Destination):
                self._held[one.service] = self._held.get(one.service, 0) + 1

    def done(self, operations: Iterable[Operation], failed: Collection[Operation]) -> None:
        """Note operations that were done, but for those that failed."""
        if self._held is None:
            return
        for one in operations:
            if one in failed:
                continue
            thing = one.thing
            if isinstance(thing, Service) and one.verb is ADD:
                self._held[thing] = 0
            elif isinstance(thing, Service) and one.verb is DELETE:
                self._held.pop(thing, None)
            elif isinstance(thing, Destination) and thing.service in self._held:
                step = 1 if one.verb is ADD else -1 if one.verb is DELETE else 0
                self._held[thing.service] += step

    def doubt(self) -> None:
        """Note that something was half done."""
        self._is_doubted = self._held is not None

    def wrong(self, found: Mapping[Service, Collection[Counted]]) -> list[str]:
        """Return what differs, in words, and take over what there is: it is told once."""
        if self._held is None:
            return []
        wrong = ["something was half done"] if self._is_doubted else []
        self._is_doubted = False
        for service, count in list(self._held.items()):
            held = found.get(service)
            if held is None:
                wrong.append(f"virtual server {service} is not there")
                del self._held[service]
            elif len(held) != count:
                wrong.append(f"virtual server {service}: {len(held)} real servers, not {count}")
                self._held[service] = len(held)
        return wrong


async def drifts(kernel: Kernel, services: Services, order: asyncio.Lock) -> AsyncIterator[Drift]:
    """Yield what is wrong with services; `order` is held by whoever changes them."""
    number, took, counted_at = -1, 0.0, 0.0
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        since = time.monotonic() - counted_at
        now = number_of_services()
        is_due = since > max(LONGEST_SECONDS, LONG_REST * took)
        if since < REST * took or not (is_due or now != number):
            continue
        async with order:
            counted_at = time.monotonic()
            number = number_of_services()
            found = await asyncio.to_thread(kernel.everything)
            wrong = services.wrong(found)
            took = time.monotonic() - counted_at
        if wrong:
            yield Drift(tuple(wrong[:MOST_TOLD]))


def number_of_services() -> int:
    """Return how many services IPVS has, whoever made them; 0 where it is not loaded.

    Raise OSError.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as asking:
        try:
            told = asking.getsockopt(socket.IPPROTO_IP, _GET_INFO, _INFO.size)
        except OSError as error:
            if isinstance(error, PermissionError):
                raise
            return 0
    return int(_INFO.unpack(told)[2])
