"""The process that answers: who may tell it what to do, and what it says of itself.

Lives here: requests, and its end. Must not: know how questions are answered (answering.py).
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Sequence

import msgspec

from vipd.backends import log as own_log
from vipd.backends.userspace.channel import Channel
from vipd.dns.server import messages
from vipd.dns.server.answering import Answering
from vipd.dns.server.messages import (
    Answer,
    Begin,
    Done,
    Feed,
    HandedOver,
    HandOver,
    Hear,
    Met,
    Quit,
    Request,
    Retire,
    Serve,
    Sibling,
    Supervised,
    Tell,
    Told,
)
from vipd.dns.server.metrics_server import MetricsServer
from vipd.proxy.version import VERSION

PAUSE_SECONDS = 0.1
CONTROL_BACKLOG = 8
MOST_PAIRS = 100
"""Addresses in one message, two sockets each: the kernel takes 253 descriptors."""


class Worker:
    """Answers; `number` is its position among the processes of the daemon."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.over = asyncio.Event()
        self._answering = Answering()
        self._metrics = MetricsServer(self.told)
        self._started = time.time()
        self._retired = False
        self._outlives = True
        self._supervised = Supervised()
        self._feeder: Channel | None = None
        self._stale_since: float | None = None
        self._ending: asyncio.Task[None] | None = None
        self._heard: set[asyncio.Task[None]] = set()

    async def answer_daemons(self, control: socket.socket) -> None:
        """Do what is asked on a connected socket, or on those that a listening one accepts."""
        control.setblocking(False)
        if not control.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            await self._talk(Channel(control.dup()))
            return
        # Whoever connects is told the process that said this last, which cannot be another's id.
        control.listen(CONTROL_BACKLOG)
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as talks:
            while True:
                try:
                    connection, _ = await loop.sock_accept(control)
                except OSError as error:  # no descriptor: the daemon waits in the queue
                    own_log.warning("the daemon is not answered", why=error.strerror)
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
                talks.create_task(self._talk(Channel(connection)))

    async def _talk(self, channel: Channel) -> None:
        try:
            while not self.over.is_set():
                data, descriptors = await channel.receive()
                given = [socket.socket(fileno=one) for one in descriptors]
                answer, beside = await self._do(messages.request_of(data), given, channel)
                if answer is not None:
                    await channel.send(messages.encode(answer), [one.fileno() for one in beside])
        except (EOFError, OSError):
            pass  # the daemon went away; the next one finds us
        except msgspec.DecodeError as error:
            own_log.warning("a request is not understood", why=str(error))
        finally:
            channel.close()
            if channel is self._feeder:
                self._stale_since = asyncio.get_running_loop().time()
                if not self._outlives:
                    self.over.set()

    async def _do(
        self, request: Request, given: list[socket.socket], channel: Channel
    ) -> tuple[Answer | None, Sequence[socket.socket]]:
        match request:
            case messages.Greet():
                return Met(VERSION, os.getpid(), self.number, self._retired), ()
            case Begin():
                self._feeder, self._stale_since = channel, None
                self._outlives = request.outlives
                pairs = 2 * len(request.listens)
                self._metrics.change(request.http, given[pairs:], request.leave_http)
                await self._answering.begin(request, given[:pairs])
                return Done(), ()
            case Feed():
                self._supervised = request.supervised
                return await self._answering.feed(request), ()
            case Sibling(number):
                await self._metrics.meet(number, given[0])
                return Done(), ()
            case Hear():
                task = asyncio.get_running_loop().create_task(self._tell(Channel(given[0])))
                self._heard.add(task)
                task.add_done_callback(self._heard.discard)
                return Done(), ()
            case Serve():
                self._answering.places.start()
                self._metrics.start()
                return Done(), ()
            case Tell():
                return self.told(), ()
            case HandOver(skip):
                # One that is retired reads them no more: they are as good.
                return self._handed_over(skip)
            case Retire():
                self._retire()
                return Done(), ()
            case Quit():
                self.over.set()
                return None, ()

    def _handed_over(self, skip: int) -> tuple[HandedOver, Sequence[socket.socket]]:
        """Return the next of its sockets; those for metrics come first."""
        places = self._answering.places
        listens = places.listens[skip : skip + MOST_PAIRS]
        sockets = places.sockets[2 * skip : 2 * (skip + MOST_PAIRS)]
        more = len(places.listens) > skip + MOST_PAIRS
        if skip:
            return HandedOver(listens, more=more), sockets
        return HandedOver(listens, self._metrics.listens, more), [*sockets, *self._metrics.sockets]

    async def _tell(self, channel: Channel) -> None:
        """Say how it is to a process of the same server, and do nothing else for it."""
        try:
            while isinstance(messages.request_of((await channel.receive())[0]), Tell):
                await channel.send(messages.encode(self.told()))
        except (EOFError, OSError, msgspec.DecodeError):
            pass  # it has ended
        finally:
            channel.close()

    # The end

    def _retire(self) -> None:
        """Take no new questions; end once those that are here are answered."""
        self._retired = True
        self._answering.places.stop()
        self._metrics.stop()
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        await self._answering.finish()
        self.over.set()

    async def close(self) -> None:
        """End everything that is open."""
        for task in list(self._heard):
            task.cancel()
        self._metrics.close()
        await self._answering.close()

    # What is asked

    def told(self) -> Told:
        """Say how it is."""
        now = asyncio.get_running_loop().time()
        answering = self._answering
        counters, zone, prebuilt = answering.counters, answering.zone, answering.zone.prebuilt
        asked, given, sums = counters.sizes()
        log = answering.serving.log
        more = {
            "udp_dropped_full": answering.places.drops(),
            "query_log_dropped": log.dropped if log is not None else 0,
        }
        return Told(
            version=VERSION,
            pid=os.getpid(),
            number=self.number,
            retired=self._retired,
            synced=zone.synced,
            services=zone.services,
            serial=zone.serial,
            fed_seconds=now - answering.fed_at,
            stale_seconds=None if self._stale_since is None else now - self._stale_since,
            listens=answering.places.listens,
            connections=len(answering.connections),
            waiting=answering.serving.waiting.count,
            counters=counters.by_name | more,
            types=counters.types(),
            rcodes=counters.named_rcodes(bad_versions=answering.serving.answers.bad_versions),
            request_sizes=asked,
            response_sizes=given,
            durations=counters.durations,
            sums=sums,
            zone={"prebuilt": len(prebuilt.replies), "prebuilt_bytes": prebuilt.bytes},
            samples=answering.forwarding.samples(),
            forwarded_rcodes=counters.named_rcodes(forwarded=True),
            supervised=self._supervised,
            http=self._metrics.listens,
            started=self._started,
        )


async def run(number: int, control: socket.socket) -> None:
    """Be a process that answers until told that it is over."""
    worker = Worker(number)
    talking = asyncio.create_task(worker.answer_daemons(control))
    over = asyncio.create_task(worker.over.wait())
    try:
        await asyncio.wait((talking, over), return_when=asyncio.FIRST_COMPLETED)
        if talking.done():
            await talking  # an error of this program ends it: the daemon starts it again
    finally:
        over.cancel()
        talking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await talking
        await worker.close()
