"""One worker: it does what the daemon tells it over a control socket, and forwards.

Lives here: requests to calls of the two forwarders, and the worker's end. Must not: know the daemon
(workers.py), or how connections are forwarded (tcp.py, udp.py).

The daemon may go and come back: the worker goes on serving what it has been told, and listens for
the next daemon on the same socket.
"""

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import Sequence

import msgspec
import structlog

from vipd.backends.userspace import messages
from vipd.backends.userspace.channel import Channel
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.forwarder.tcp import TcpForwarder
from vipd.backends.userspace.forwarder.udp import UdpForwarder
from vipd.backends.userspace.messages import (
    Answer,
    Batch,
    Change,
    Counted,
    Cut,
    Done,
    EndpointReport,
    HandedOver,
    Listen,
    PlaceReport,
    Request,
    Retire,
    Stop,
    Told,
    WirePlace,
)
from vipd.backends.userspace.objects import Place, Surroundings
from vipd.proxy.names import Protocol
from vipd.proxy.version import VERSION

IDLE_LOOK_SECONDS = 0.5
"""How often a retired worker looks whether it may end."""

log = structlog.get_logger()


class Worker:
    """Serves places; `number` is its position among the workers of the daemon."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.over = asyncio.Event()
        self._retired = False
        self._surroundings = Surroundings()
        self._served: dict[Place, Served] = {}
        self._tcp = TcpForwarder(asyncio.get_running_loop())
        self._udp = UdpForwarder()

    async def answer_daemons(self, control: socket.socket) -> None:
        """Accept the daemon, and the next one after its restart. Never ends."""
        loop = asyncio.get_running_loop()
        control.setblocking(False)
        async with asyncio.TaskGroup() as talks:
            while True:
                connection, _ = await loop.sock_accept(control)
                talks.create_task(self._talk(Channel(connection)))

    async def close(self) -> None:
        """End everything that is open."""
        self._tcp.close()
        await self._udp.close()

    async def _talk(self, channel: Channel) -> None:
        try:
            while not self.over.is_set():
                data, descriptors = await channel.receive()
                given = [socket.socket(fileno=one) for one in descriptors]
                answer, beside = await self._do(messages.request_of(data), given)
                if answer is not None:
                    await channel.send(messages.encode(answer), [one.fileno() for one in beside])
                for one in beside:
                    one.close()
        except (EOFError, OSError):
            pass  # the daemon went away; the next one finds us
        except msgspec.DecodeError as error:
            log.warning("a request is not understood", why=str(error))
        finally:
            channel.close()

    async def _do(
        self, request: Request, given: list[socket.socket]
    ) -> tuple[Answer | None, Sequence[socket.socket]]:
        match request:
            case Batch():
                return await self._batch(request, given), ()
            case messages.Tell():
                return self._told(), ()
            case messages.Count():
                return Counted(self._open()), ()
            case messages.HandOver(places):
                return self._hand_over(places)
            case Retire():
                self._retire()
            case messages.Quit():
                self.over.set()
        return None, ()

    # What the daemon wants

    async def _batch(self, batch: Batch, given: list[socket.socket]) -> Done:
        failed: list[tuple[WirePlace, str]] = []
        ended = 0
        around = self._surroundings
        if batch.surroundings is not None:
            around = messages.surroundings_of(batch.surroundings)
        if around != self._surroundings:
            self._surroundings = around
            for served in self._served.values():
                served.update(served.forwarding, self._surroundings)
        sockets = iter(given)
        for one in batch.operations:
            place = messages.place_of(one.place)
            match one:
                case Listen():
                    try:
                        await self._listen(place, next(sockets), one)
                    except OSError as error:
                        failed.append((one.place, os.strerror(error.errno or 0)))
                case Change():
                    if (known := self._served.get(place)) is not None:
                        known.update(messages.forwarding_of(one.forwarding), self._surroundings)
                    else:
                        failed.append((one.place, "nobody listens there"))
                case Stop():
                    if one.at_once and place.protocol is Protocol.UDP:
                        self._end_sessions(place)
                    self._stop(place)
                case Cut():
                    ended += self._cut(place, one)
        return Done(batch.number, failed, ended)

    async def _listen(self, place: Place, listener: socket.socket, told: Listen) -> None:
        forwarding = messages.forwarding_of(told.forwarding)
        served = Served(place, forwarding, self._surroundings, random.random)
        if place in self._served:
            self._stop(place)
        if place.protocol is Protocol.UDP:
            await self._udp.listen(place, listener, served)
        else:
            self._tcp.listen(place, listener, served)
        self._served[place] = served

    def _stop(self, place: Place) -> None:
        if self._served.pop(place, None) is None:
            return
        if place.protocol is Protocol.UDP:
            self._udp.stop(place)
        else:
            self._tcp.stop(place)

    def _end_sessions(self, place: Place) -> None:
        served = self._served.get(place)
        if served is not None:
            for one in {*served.forwarding.inside, *served.forwarding.outside}:
                self._udp.cut(place, one)

    def _cut(self, place: Place, told: Cut) -> int:
        endpoint = messages.endpoint_of(told.endpoint)
        if place.protocol is Protocol.UDP:
            return self._udp.cut(place, endpoint)
        return self._tcp.cut(place, endpoint)

    def _hand_over(self, places: Sequence[WirePlace]) -> tuple[HandedOver, list[socket.socket]]:
        told, given = [], []
        for wire in places:
            place = messages.place_of(wire)
            forwarder = self._udp if place.protocol is Protocol.UDP else self._tcp
            listener = forwarder.hand_over(place)
            self._served.pop(place, None)
            if listener is not None:
                told.append(wire)
                given.append(listener)
        return HandedOver(told), given

    def _retire(self) -> None:
        """End as soon as nothing is open any more."""
        for place in list(self._served):
            self._stop(place)
        if not self._retired:
            self._retired = True
            self._look()

    def _look(self) -> None:
        if self._open():
            asyncio.get_running_loop().call_later(IDLE_LOOK_SECONDS, self._look)
        else:
            self.over.set()

    # What the daemon asks

    def _open(self) -> list[tuple[WirePlace, int]]:
        counts = self._tcp.connections() | self._udp.sessions()
        return [(messages.wire_place(place), count) for place, count in counts.items() if count]

    def _told(self) -> Told:
        places = [_report(place, served) for place, served in self._served.items()]
        around = messages.wire_surroundings(self._surroundings)
        counters = self._tcp.counters.by_name() | self._udp.counters.by_name()
        return Told(VERSION, os.getpid(), self.number, self._retired, around, places, counters)


def _report(place: Place, served: Served) -> PlaceReport:
    told = served.told()
    endpoints = [
        EndpointReport(
            one.address,
            one.port,
            one.weight,
            one.connections,
            one.so_far,
            one.failures,
            one.set_aside_until is not None,
        )
        for one in told.endpoints
    ]
    forwarding = messages.wire_forwarding(served.forwarding)
    return PlaceReport(
        messages.wire_place(place), forwarding, endpoints, told.denied, told.unserved
    )


async def run(number: int, control: socket.socket) -> None:
    """Be a worker until the daemon says that it is over."""
    worker = Worker(number)
    talking = asyncio.create_task(worker.answer_daemons(control))
    try:
        await worker.over.wait()
    finally:
        talking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await talking
        await worker.close()
