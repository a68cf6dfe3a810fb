"""One worker: it does what the daemon tells it over a control socket, and forwards.

Lives here: requests to calls of the two forwarders, and the worker's end. Must not: know the daemon
(workers.py), or how connections are forwarded (tcp.py, udp.py).

The daemon may go and come back: the worker goes on serving what it has been told, and listens for
the next daemon on the same socket.
"""

import asyncio
import errno
import os
import random
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from vipd.backends import log
from vipd.backends.userspace import messages
from vipd.backends.userspace.channel import Channel
from vipd.backends.userspace.forwarder import interface, reports
from vipd.backends.userspace.forwarder.descriptors import may_listen, shares
from vipd.backends.userspace.forwarder.on_demand import OnDemand
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.forwarder.tcp import TcpForwarder
from vipd.backends.userspace.forwarder.transparent import Transparent
from vipd.backends.userspace.forwarder.turns import in_turns
from vipd.backends.userspace.forwarder.udp import UdpForwarder
from vipd.backends.userspace.forwarder.udp_sessions import UdpLimits
from vipd.backends.userspace.messages import (
    Answer,
    Batch,
    Change,
    ClientReport,
    Counted,
    Cut,
    Done,
    HandedOver,
    Instruction,
    Listen,
    PlaceReport,
    Report,
    Reported,
    Request,
    Retire,
    ServedPlace,
    Stop,
    Told,
    WirePlace,
)
from vipd.backends.userspace.objects import Place, Surroundings
from vipd.proxy.names import Protocol
from vipd.proxy.version import VERSION

PAUSE_SECONDS = 1.0
"""After an attempt to accept the daemon that failed."""
IDLE_LOOK_SECONDS = 0.5
"""How often a retired worker looks whether it may end."""

_NO_LISTENER: Final = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
"""Errors of a control socket that will never be accepted from again."""
_LOST: Final = "its listener was lost on the way: no descriptor was left for it"


class Worker:
    """Serves places; `number` is its position among the workers of the daemon.

    `descriptors` is how many files it may have open; `transparent`: it may show clients' addresses
    to endpoints.
    """

    def __init__(self, number: int, descriptors: int, *, transparent: bool = False) -> None:
        self.number = number
        self.over = asyncio.Event()
        self._turn = asyncio.Lock()
        """One request at a time: a daemon may come while what its predecessor asked is done."""
        self._descriptors = descriptors
        self._serves = True
        """Whether it takes new connections."""
        self._ends = False
        """Whether it is over as soon as nothing is open any more."""
        self._started = asyncio.get_running_loop().time()
        self._surroundings = Surroundings()
        self._served: dict[Place, OnDemand] = {}
        self._transparent = Transparent() if transparent else None
        self._tcp = TcpForwarder(asyncio.get_running_loop(), transparent=self._transparent)
        self._udp = UdpForwarder(transparent=self._transparent)
        self._share_out()

    async def answer_daemons(self, control: socket.socket) -> None:
        """Accept the daemon, and the next one after its restart.

        Ends only with an error: no daemon can come any more.
        """
        loop = asyncio.get_running_loop()
        control.setblocking(False)
        async with asyncio.TaskGroup() as talks:
            while True:
                try:
                    connection, _ = await loop.sock_accept(control)
                except OSError as error:  # no descriptor: the daemon waits in the queue
                    if error.errno in _NO_LISTENER:
                        raise
                    log.warning("the daemon is not answered", why=error.strerror)
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
                talks.create_task(self._talk(Channel(connection)))

    async def close(self) -> None:
        """End everything that is open."""
        self._tcp.close()
        await self._udp.close()
        if self._transparent is not None:
            self._transparent.close()

    async def _talk(self, channel: Channel) -> None:
        try:
            while not self.over.is_set():
                data, descriptors = await channel.receive()
                given = [_non_blocking(one) for one in descriptors]
                await self._answer(channel, data, given)
        except (EOFError, OSError):
            pass  # the daemon went away; the next one finds us
        except msgspec.DecodeError as error:
            log.warning("a request is not understood", why=str(error))
        except Exception:  # whatever it was, the next daemon has to find us
            log.exception("a request failed inside")
        finally:
            channel.close()

    async def _answer(self, channel: Channel, data: bytes, given: list[socket.socket]) -> None:
        """Do what a message asks for, and answer it. Sockets that nobody took are closed."""
        beside: Sequence[socket.socket] = ()
        left = iter(given)
        try:
            request = messages.request_of(data)
            async with self._turn:
                answer, beside = await self._do(request, left)
            if answer is not None:
                await channel.send(messages.encode(answer), [one.fileno() for one in beside])
        finally:
            for one in (*left, *beside):
                one.close()

    async def _do(
        self, request: Request, given: Iterator[socket.socket]
    ) -> tuple[Answer | None, Sequence[socket.socket]]:
        match request:
            case Batch():
                return await self._batch(request, given), ()
            case messages.Tell():
                return await self._told(), ()
            case messages.Count():
                return Counted(self._open()), ()
            case Report():
                return self._reported(request), ()
            case messages.HandOver(places):
                return self._hand_over(places)
            case Retire():
                await self._retire()
            case messages.Pause():
                await self._pause()
            case messages.Resume():
                self._serves, self._ends = True, False
                return await self._told(), ()
            case messages.Quit():
                self.over.set()
        return None, ()

    # What the daemon wants

    async def _batch(self, batch: Batch, given: Iterable[socket.socket]) -> Done:
        """Do all of it; what fails is answered for its place, and harms no other."""
        if self._transparent is not None:
            self._transparent.forget_ways()
        listeners = iter(given)
        failed: list[tuple[WirePlace, str]] = []
        short: list[tuple[WirePlace, str]] = []
        ended = 0
        around = self._surroundings
        if batch.surroundings is not None:
            around = messages.surroundings_of(batch.surroundings)
        if around != self._surroundings:
            self._surroundings = around
            async for place, served in in_turns(list(self._served.items())):
                try:
                    served.change(served.told, self._surroundings)
                except Exception as error:
                    failed.append((messages.wire_place(place), _told_of(error)))
        async for one in in_turns(batch.instructions):
            try:
                ended += await self._follow(one, listeners)
            except Exception as error:
                whose = short if _is_short(error) else failed
                whose.append((one.place, _told_of(error)))
        self._share_out()
        return Done(batch.number, failed, ended, short)

    async def _follow(self, one: Instruction, given: Iterator[socket.socket]) -> int:
        """Do one instruction; return how many connections and sessions it ended.

        Raise OSError and ValueError where it cannot be done.
        """
        place = messages.place_of(one.place)
        match one:
            case Listen():
                if (listener := next(given, None)) is None:
                    raise OSError(errno.EMFILE, _LOST)
                try:
                    await self._listen(place, listener, one)
                except BaseException:
                    listener.close()
                    raise
            case Change():
                if (known := self._served.get(place)) is None:
                    raise ValueError("nobody listens there")
                known.change(one.forwarding, self._surroundings)
            case Stop():
                self._stop(place)
                if one.at_once and place.protocol is Protocol.UDP:
                    self._udp.end(place)
            case Cut():
                return self._cut(place, one)
        return 0

    async def _listen(self, place: Place, listener: socket.socket, told: Listen) -> None:
        used = self._tcp.descriptors() + self._udp.descriptors()
        if not may_listen(self._descriptors, used):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        served = OnDemand(place, told.forwarding, self._surroundings, random.random)
        if place in self._served:
            self._stop(place)
        if place.protocol is Protocol.UDP:
            differs = told.forwarding.outside is not None or told.forwarding.transparent_for_pods
            if self._surroundings.interface and differs:
                interface.ask(listener)  # for the first datagram; the forwarder would be late
            await self._udp.listen(place, listener, served.serve)
        else:
            self._tcp.listen(place, listener, served.serve)
        self._served[place] = served

    def _share_out(self) -> None:
        """Leave to connections and sessions what listeners do not take."""
        found = shares(self._descriptors, len(self._served), UdpLimits().most)
        self._tcp.allow(found.connections)
        self._udp.allow(found.sessions)

    def _stop(self, place: Place) -> None:
        if self._served.pop(place, None) is None:
            return
        if place.protocol is Protocol.UDP:
            self._udp.stop(place)
        else:
            self._tcp.stop(place)

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
        self._share_out()
        return HandedOver(told), given

    async def _retire(self) -> None:
        """End as soon as nothing is open any more."""
        self._serves = False
        async for place in in_turns(list(self._served)):
            self._stop(place)
        if not self._ends:
            self._ends = True
            self._look()

    async def _pause(self) -> None:
        """Accept no connection."""
        self._serves = False
        accepting = [one for one in self._served if one.protocol is not Protocol.UDP]
        async for place in in_turns(accepting):
            self._stop(place)

    def _look(self) -> None:
        if not self._ends:
            return
        if self._open():
            asyncio.get_running_loop().call_later(IDLE_LOOK_SECONDS, self._look)
        else:
            self.over.set()

    # What the daemon asks

    def _open(self) -> list[tuple[WirePlace, int]]:
        counts = self._tcp.connections() | self._udp.sessions()
        return [(messages.wire_place(place), count) for place, count in counts.items() if count]

    async def _told(self) -> Told:
        places = [
            ServedPlace(messages.wire_place(place), one.told)
            async for place, one in in_turns(list(self._served.items()))
        ]
        around = messages.wire_surroundings(self._surroundings)
        shows = self._transparent is not None
        return Told(
            VERSION, os.getpid(), self.number, not self._serves, around, places, shows,
            self._descriptors,
        )  # fmt: skip

    def _reported(self, asked: Report) -> Reported:
        now = asyncio.get_running_loop().time()
        counts = self._tcp.connections() | self._udp.sessions()
        shown = self._transparent.by_name() if self._transparent is not None else {}
        places = []
        for place in map(messages.place_of, asked.places):
            if place in self._served or counts.get(place):
                client = self._of_client(place, asked.client, now) if asked.client else None
                places.append(self._of_place(place, counts.get(place, 0), client, now))
        return Reported(
            number=self.number,
            pid=os.getpid(),
            retired=not self._serves,
            seconds=now - self._started,
            listeners=len(self._served),
            connections=sum(counts.values()),
            counters=self._tcp.counters.by_name() | self._udp.counters.by_name() | shown,
            places=places,
            files=self._descriptors,
            full=self._tcp.is_full,
        )

    def _of_place(
        self, place: Place, count: int, client: ClientReport | None, now: float
    ) -> PlaceReport:
        known = self._served.get(place)
        if known is not None and known.made is None:  # nobody has come
            return PlaceReport(messages.wire_place(place), True, count, 0, 0, 0, [], client)
        return reports.place(place, self._state(place), count, client, now)

    def _of_client(self, place: Place, client: str, now: float) -> ClientReport:
        forwarder = self._udp if place.protocol is Protocol.UDP else self._tcp
        connections = forwarder.of_client(place, client)
        return reports.of_client(self._state(place), connections, client, now)

    def _state(self, place: Place) -> Served | None:
        known = self._served.get(place)
        return known.made if known is not None else None


def _non_blocking(descriptor: int) -> socket.socket:
    """Return the socket; one that blocks would stop everything. How it comes is up to others."""
    made = socket.socket(fileno=descriptor)
    made.setblocking(False)
    return made


def _is_short(error: Exception) -> bool:
    """Return whether an instruction failed for want of a descriptor."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def _told_of(error: Exception) -> str:
    """Return why an instruction failed; what is nobody's but ours is logged as well."""
    if isinstance(error, OSError):
        return error.strerror or repr(error)
    if not isinstance(error, ValueError):
        log.exception("an instruction failed inside")
    return str(error)


async def run(
    number: int, control: socket.socket, descriptors: int, *, transparent: bool = False
) -> None:
    """Be a worker with so many descriptors until the daemon says that it is over.

    It ends as well, with what is open, where no daemon could ever reach it again.
    """
    worker = Worker(number, descriptors, transparent=transparent)
    talking = asyncio.create_task(worker.answer_daemons(control))
    over = asyncio.create_task(worker.over.wait())
    try:
        await asyncio.wait([talking, over], return_when=asyncio.FIRST_COMPLETED)
    finally:
        over.cancel()
        talking.cancel()
        try:
            await talking
        except asyncio.CancelledError:
            pass
        except Exception:
            log.exception("no daemon is answered any more")
        await worker.close()
