"""The process that answers: what it is told, and what it does about it.

Lives here: requests, the sockets, the zone that is answered from and the one that is being fed.
Must not: know what a question means (answer.py), or how it arrives (udp.py, tcp.py).

While nobody tells changes it goes on with the last zone: the daemon's restart is no reason to be
silent, and what it knows is as good as the kernel's rules, which stay too.
"""

import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import Sequence

import msgspec

from vipd.backends.userspace.channel import Channel
from vipd.backends.userspace.forwarder import log
from vipd.dns.answer import Answers
from vipd.dns.feed import Portion
from vipd.dns.server import messages
from vipd.dns.server.access import Access, Refusals
from vipd.dns.server.counters import Counters
from vipd.dns.server.forwarding import Forwarding
from vipd.dns.server.messages import (
    Answer,
    Begin,
    Done,
    Fed,
    Feed,
    HandedOver,
    HandOver,
    Met,
    Quit,
    Request,
    Retire,
    Serve,
    Tell,
    Told,
    WireListen,
)
from vipd.dns.server.serving import Serving
from vipd.dns.server.tcp import Connections, TcpServer
from vipd.dns.server.udp import UdpServer
from vipd.dns.server.waiting import Waiting
from vipd.dns.settings import DnsSettings, answer_settings, zone_settings
from vipd.dns.zone import Zone
from vipd.proxy.names import parse_network
from vipd.proxy.version import VERSION

PAUSE_SECONDS = 0.1
RETIRE_SECONDS = 10.0
"""How long what waits for upstreams may take when this process has to go."""
_LOOPBACK = ("127.0.0.0/8", "::1")


class Place:
    """The two sockets of an address."""

    def __init__(
        self,
        listen: WireListen,
        sockets: tuple[socket.socket, socket.socket],
        serving: Serving,
        connections: Connections,
    ) -> None:
        self.listen = listen
        self.udp = UdpServer(sockets[0], serving)
        self.tcp = TcpServer(sockets[1], serving, connections)

    def start(self) -> None:
        """Answer from now on."""
        self.udp.start()
        self.tcp.start()

    def stop(self) -> None:
        """Take no new questions."""
        self.udp.stop()
        self.tcp.stop()

    def close(self) -> None:
        """Close the sockets, which others may have as well."""
        self.stop()
        self.udp.listener.close()
        self.tcp.listener.close()


class Worker:
    """Answers; `number` is its position among the processes of the daemon."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.over = asyncio.Event()
        self._settings = DnsSettings()
        self._zone = Zone()
        self._counters = Counters()
        now = asyncio.get_running_loop().time()
        self._serving = Serving(
            Answers(self._zone),
            Access(()),
            Refusals(0, now),
            Waiting(self._settings.waiting, self._settings.waiting_of_client, self._counters),
            self._counters,
        )
        self._forwarding = Forwarding(self._serving)
        self._connections = Connections(0, 0, self._serving)
        self._fed: tuple[Zone, DnsSettings] = self._zone, self._settings
        """What changes go into: the zone that is answered from, or the next one."""
        self._allowed: tuple[str, ...] = ()
        self._places: list[Place] = []
        self._serves = False
        self._retired = False
        self._outlives = True
        self._feeder: Channel | None = None
        self._fed_at = now
        self._stale_since: float | None = None
        self._ending: asyncio.Task[None] | None = None

    # Those who tell

    async def answer_daemons(self, control: socket.socket) -> None:
        """Do what is asked on a connected socket, or on those that a listening one accepts."""
        control.setblocking(False)
        if not control.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            await self._talk(Channel(control.dup()))
            return
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as talks:
            while True:
                try:
                    connection, _ = await loop.sock_accept(control)
                except OSError as error:  # no descriptor: the daemon waits in the queue
                    log.warning("the daemon is not answered", why=error.strerror)
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
            log.warning("a request is not understood", why=str(error))
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
                await self._begin(request.settings, request.listens, given)
                return Done(), ()
            case Feed(portion, synced):
                await self._feed(portion, synced=synced)
                zone = self._fed[0]
                return Fed(zone.services, zone.serial), ()
            case Serve():
                self._serves = True
                for place in self._places:
                    place.start()
                return Done(), ()
            case Tell():
                return self._told(), ()
            case HandOver():
                places = [] if self._retired else self._places
                beside = [one for it in places for one in (it.udp.listener, it.tcp.listener)]
                return HandedOver([one.listen for one in places]), beside
            case Retire():
                self._retire()
                return Done(), ()
            case Quit():
                self.over.set()
                return None, ()

    # What it is

    async def _begin(
        self, settings: DnsSettings, listens: list[WireListen], given: list[socket.socket]
    ) -> None:
        self._fed = Zone(zone_settings(settings)), settings
        for at, listen in enumerate(listens):
            pair = given[2 * at], given[2 * at + 1]
            place = Place(listen, pair, self._serving, self._connections)
            self._places.append(place)
            if self._serves:
                place.start()
        if self._zone.synced:
            self._admit()  # the zone before is answered from until the next one is whole
        else:
            await self._adopt()

    async def _feed(self, portion: Portion, *, synced: bool) -> None:
        zone = self._fed[0]
        for facts in portion.put:
            zone.put(facts)
        for name in portion.drop:
            zone.drop(name)
        for pod in portion.put_pods:
            zone.put_pod(pod)
        for name in portion.drop_pods:
            zone.drop_pod(name)
        if portion.namespaces is not None:
            zone.namespaces(portion.namespaces or None)
        if portion.allow is not None and set(portion.allow) != set(self._allowed):
            self._allowed = portion.allow
            self._admit()
        zone.stamp(int(time.time()))
        self._fed_at = asyncio.get_running_loop().time()
        if synced and not zone.synced:
            zone.synced = True
            if zone is not self._zone:
                await self._adopt()
            gc.freeze()  # what is there now stays, most of it

    async def _adopt(self) -> None:
        """Answer from the zone that was fed, by its settings."""
        self._zone, settings = self._fed
        self._settings, serving = settings, self._serving
        serving.answers = Answers(self._zone, answer_settings(settings))
        now = asyncio.get_running_loop().time()
        if serving.refusals.per_second != settings.refusals_per_second:
            serving.refusals = Refusals(settings.refusals_per_second, now)
        serving.waiting.most = settings.waiting
        serving.waiting.most_of_client = settings.waiting_of_client
        serving.tcp_seconds = (
            settings.tcp_first_seconds,
            settings.tcp_idle_seconds,
            settings.tcp_write_seconds,
        )
        self._connections.most = settings.tcp_connections
        self._connections.most_of_client = settings.tcp_connections_of_client
        self._admit()
        await self._forwarding.change(settings, [one.listen for one in self._places])

    def _admit(self) -> None:
        """Let those ask who may."""
        own = [address for address, _ in (one.listen for one in self._places)]
        texts = (*_LOOPBACK, *own, *self._settings.allow, *self._allowed)
        self._serving.access = Access(parse_network(one.partition("%")[0]) for one in texts)

    # The end

    def _retire(self) -> None:
        """Take no new questions; end once those that are here are answered."""
        self._retired, self._serves = True, False
        for place in self._places:
            place.stop()
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETIRE_SECONDS):
                await self._connections.finish()
                for place in self._places:
                    await place.udp.finish()
        self.over.set()

    async def close(self) -> None:
        """End everything that is open."""
        self._connections.close()
        for place in self._places:
            place.close()
        await self._forwarding.close()

    # What is asked

    def _told(self) -> Told:
        now = asyncio.get_running_loop().time()
        counters = self._counters
        asked, given, sums = counters.sizes()
        drops = {"udp_dropped_full": sum(one.udp.drops() for one in self._places)}
        prebuilt = self._zone.prebuilt
        return Told(
            version=VERSION,
            pid=os.getpid(),
            number=self.number,
            retired=self._retired,
            synced=self._zone.synced,
            services=self._zone.services,
            serial=self._zone.serial,
            fed_seconds=now - self._fed_at,
            stale_seconds=None if self._stale_since is None else now - self._stale_since,
            listens=[one.listen for one in self._places],
            connections=len(self._connections),
            waiting=self._serving.waiting.count,
            counters=counters.by_name | drops,
            types=counters.types(),
            rcodes=counters.named_rcodes(),
            request_sizes=asked,
            response_sizes=given,
            durations=counters.durations,
            sums=sums,
            zone={"prebuilt": len(prebuilt.replies), "prebuilt_bytes": prebuilt.bytes},
            samples=self._forwarding.samples(),
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
