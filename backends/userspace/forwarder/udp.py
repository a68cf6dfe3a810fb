"""UDP: one session for each client address and port of a place.

Lives here: the way of a datagram from a client to its endpoint and back, and the life of a session.
Must not: choose endpoints (served.py), know how one is reached (udp_link.py), or who has to make
room for whom (udp_sessions.py).

A place's own socket is read directly, several datagrams at a time, and replies leave through it,
so that they come from the address the client sent to. Nothing is kept between it and the kernel:
whoever takes the socket over gets what still waits in it. Nothing here ever waits for a socket;
what does not fit is dropped and counted, as UDP has it.
"""

import asyncio
import socket
from collections.abc import Callable, Iterable

from vipd.backends import log
from vipd.backends.userspace.forwarder import udp_listening
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.forwarder.transparent import Transparent
from vipd.backends.userspace.forwarder.udp_link import NOT_ITS_FAULT, Datagram, UdpLink
from vipd.backends.userspace.forwarder.udp_listening import NOW
from vipd.backends.userspace.forwarder.udp_sessions import (
    ClientAddress,
    Listening,
    Session,
    Sessions,
    UdpCounters,
    UdpLimits,
)
from vipd.backends.userspace.forwarder.udp_unanswered import Unanswered
from vipd.backends.userspace.objects import Place
from vipd.proxy.virtualserver import Endpoint

LARGEST = 65_536
"""Bytes. No datagram is larger than 65,507 (IPv4) or 65,527 (IPv6, without jumbograms)."""
BATCH = 32
"""Datagrams read from a place before others have their turn."""
MOST_ROUNDS = 64
"""How often a socket is read for the last time, while clients go on sending."""
LOG_SECONDS = 60.0
"""Descriptors that run out are logged once, and again when they had been there for so long."""
MOST_TRIES = 3
"""Endpoints that a datagram is sent to, one after the other, where the error comes back at once."""


class UdpForwarder:
    """The UDP places of a worker. All methods belong to the thread of the event loop."""

    def __init__(
        self, limits: UdpLimits | None = None, transparent: Transparent | None = None
    ) -> None:
        self.counters = UdpCounters()
        self._places: dict[Place, Listening] = {}
        self._limits = limits or UdpLimits()
        self._transparent = transparent
        self._sessions = Sessions(self._limits)
        self._buffer = bytearray(LARGEST)
        self._view = memoryview(self._buffer)
        self._expiry: asyncio.TimerHandle | None = None
        self._unanswered = Unanswered(self._failed_silently)
        self._tasks: set[asyncio.Task[None]] = set()
        self._short_at: float | None = None

    async def listen(self, place: Place, bound: socket.socket, serve: Callable[[], Served]) -> None:
        """Serve the place from now on. The socket is bound to it; it is ours now.

        `serve` is called when the state of the place is needed, and returns it. A place that was
        stopped takes up what is left of its sessions. Raise ValueError where the place is listened
        at; after that, and after OSError, the socket is still the caller's.
        """
        bound.setblocking(False)
        listening = self._places.get(place)
        if listening is None:
            listening = self._places[place] = Listening(place, bound, serve)
        elif listening.is_open:
            raise ValueError(f"{place} is listened at already")
        else:
            self._take_over(listening, serve)
            listening.is_open = True
            self._replace(listening, bound)
        listening.tells_interface = False
        try:
            asyncio.get_running_loop().add_reader(bound, self._readable, listening)
        except BaseException:
            listening.is_open, listening.bound = False, None
            self._release_if_over(listening)
            raise
        listening.is_read = True

    def stop(self, place: Place) -> None:
        """Begin no new session there. The socket is closed when the last session ended."""
        listening = self._places.get(place)
        if listening is not None:
            listening.is_open = False
            self._release_if_over(listening)

    def end(self, place: Place) -> None:
        """Stop there, and end every session, so that the socket is closed now."""
        listening = self._places.get(place)
        if listening is not None:
            listening.is_open = False
            for session in list(listening.sessions.values()):
                self._end(session)
            self._release_if_over(listening)

    def hand_over(self, place: Place) -> socket.socket | None:
        """Return the place's socket, as it was given; None where there is none, or no more.

        What clients send is for the new owner; replies to the sessions that are here still leave
        from the place's address, until they are idle.
        """
        listening = self._places.get(place)
        if listening is None or not listening.is_read:
            return None
        listening.is_open = False
        given = udp_listening.give_away(listening)
        if listening.bound is None:  # no descriptor: replies that are under way are lost
            for session in list(listening.sessions.values()):
                self._end(session)
        self._release_if_over(listening)
        return given

    def cut(self, place: Place, endpoint: Endpoint) -> int:
        """End the sessions with this endpoint, and return how many there were.

        A client that goes on begins a new one, with another endpoint.
        """
        listening = self._places.get(place)
        cut = listening.sessions_with(endpoint) if listening is not None else []
        for session in cut:
            self._end(session)
        return len(cut)

    def allow(self, sessions: int) -> None:
        """Have no more than so many from now on, nor more than the limits say.

        Those beyond end with the next that begins.
        """
        self._sessions.limits = self._limits.within(sessions)

    def descriptors(self) -> int:
        """Return how many are taken by places and sessions."""
        return len(self._places) + len(self._sessions)

    def sessions(self) -> dict[Place, int]:
        """Return the number of sessions of each place that has any, stopped ones included."""
        return {one.place: len(one.sessions) for one in self._sessions.busy}

    def of_client(self, place: Place, client: str) -> list[tuple[int, Endpoint]]:
        """Return source port and endpoint of each session that a client has there."""
        listening = self._places.get(place)
        return listening.of_client(client) if listening is not None else []

    async def close(self) -> None:
        """End everything, and return when every socket is closed."""
        for place in list(self._places):
            self.end(place)
        self._unanswered.close()
        if self._expiry is not None:
            self._expiry.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _readable(self, listening: Listening) -> bool:
        """Read some of what clients sent; return whether there may be more."""
        now = asyncio.get_running_loop().time()
        for _ in range(BATCH):
            if not listening.is_read or listening.bound is None:
                return False
            came_by = ""
            try:
                if listening.served.asks_interface:
                    size, client, came_by = udp_listening.receive(
                        listening, listening.bound, self._buffer
                    )
                else:
                    size, client = listening.bound.recvfrom_into(self._buffer, 0, NOW)
            except BlockingIOError:
                return False
            except OSError:  # of something sent before: it belongs to nobody here
                continue
            self._arrived(listening, client, self._view[:size], now, came_by)
        return True

    def _arrived(
        self,
        listening: Listening,
        client: ClientAddress,
        datagram: Datagram,
        now: float,
        came_by: str,
    ) -> None:
        session = listening.sessions.get(client)
        if session is None:
            session = self._begin(listening, client, now, came_by)
            if session is None:
                return
        else:
            session.came_by = came_by or session.came_by
            if session.seen is not listening.served.forwarding and not self._may_go_on(session):
                return
            if session.link is None and not self._open(session, now, anew=True):
                return
            self._sessions.used(session, now)
        self._send(session, datagram, now)

    def _begin(
        self, listening: Listening, client: ClientAddress, now: float, came_by: str
    ) -> Session | None:
        """Return a new session; None where there can be none, which is counted."""
        if not listening.is_open:
            self.counters.unserved += 1
            return None
        if not listening.served.allows(client[0]):
            self.counters.denied += 1
            return None
        session = Session(listening, client, came_by)
        if not self._open(session, now, anew=True):
            return None
        while (idlest := self._sessions.in_the_way(listening, session.host)) is not None:
            self.counters.evicted += 1
            self._end(idlest)
        self._sessions.add(session, now)
        self.counters.sessions += 1
        if self._expiry is None:
            self._expire()
        return session

    def _may_go_on(self, session: Session) -> bool:
        """Look at a session again, as the place is served differently since its last datagram."""
        served = session.listening.served
        if not served.allows(session.host):
            self.counters.denied += 1
            self._end(session)
            return False
        session.seen = served.forwarding
        if session.endpoint is not None and not served.has(session.endpoint):
            self.counters.moved += 1
            session.tried = ()
            self._unlink(session)
        return True

    def _open(self, session: Session, now: float, anew: bool) -> bool:
        """Link a session that has no link; return whether it has one now, and count if not.

        `anew`: endpoints that were tried in vain are tried again where there is no other.
        """
        served, shown = session.listening.served, self._transparent
        host, port = session.client[0], session.client[1]
        if served.asks_interface:  # the place forgets it with every change, and among many clients
            served.came_by(host, session.came_by)
        endpoint = served.choose(host, port, now, session.tried)
        if endpoint is None and session.tried and anew:
            session.tried = ()
            endpoint = served.choose(host, port, now)
        if endpoint is None:
            self.counters.unserved += 1
            return False
        try:
            link = UdpLink(
                endpoint,
                lambda reply: self._heard(session, reply),
                lambda error, unsent: self._lost(session, error, unsent),
                shown.binder(served, session.client[:2], endpoint) if shown is not None else None,
            )
        except OSError as error:
            served.withdrawn(endpoint)
            self._short(error, 1, now)
            return False
        self._tasks.add(link.task)
        link.task.add_done_callback(self._tasks.discard)
        session.link, session.endpoint, session.answered = link, endpoint, False
        served.began(host, endpoint, now)
        return True

    def _send(self, session: Session, datagram: Datagram, now: float) -> None:
        if session.link is None:
            return
        try:
            session.link.send(datagram)
        except OSError as error:
            if error.errno in NOT_ITS_FAULT:
                self.counters.no_room += 1
            else:
                self._failed(session, [datagram], now, anew=True)
            return
        self.counters.forwarded += 1
        self._unanswered.add(session)

    def _heard(self, session: Session, reply: bytes) -> None:
        listening = session.listening
        self._unanswered.discard(session)
        if not session.answered and session.endpoint is not None:
            session.answered = True
            session.tried = ()
            listening.served.answered(session.endpoint)
        self._sessions.used(session, asyncio.get_running_loop().time())
        if listening.bound is None:
            return
        try:
            listening.bound.sendto(reply, NOW, session.client)
        except OSError:
            self.counters.no_room += 1
        else:
            self.counters.replies += 1

    def _lost(self, session: Session, error: OSError, unsent: list[bytes]) -> None:
        now = asyncio.get_running_loop().time()
        if error.errno in NOT_ITS_FAULT:
            self._short(error, len(unsent), now)
            self._end(session)
        else:
            self._failed(session, unsent, now, anew=False)

    def _failed(self, session: Session, unsent: Iterable[Datagram], now: float, anew: bool) -> None:
        """Give an endpoint up that is not there, and send what it did not get to others.

        The session stays, so that the client's next datagram goes to one that was not tried.
        """
        endpoint = session.endpoint
        if endpoint is None:
            return
        self.counters.refused += 1
        self._unlink(session)
        session.listening.served.failed(endpoint, now)
        session.tried = (*session.tried, endpoint)
        if len(session.tried) >= MOST_TRIES and not anew:
            return  # the client will send again
        for datagram in unsent:
            if session.link is None and not self._open(session, now, anew):
                return
            self._send(session, datagram, now)

    def _failed_silently(self, session: Session) -> None:
        """Note that an error came back for datagrams that are gone."""
        self._failed(session, (), asyncio.get_running_loop().time(), anew=False)

    def _expire(self) -> None:
        """End what is idle for too long, and come back when the next one is due."""
        loop = asyncio.get_running_loop()
        self._expiry = None
        while (first := self._sessions.first_due()) is not None:
            session, due = first
            if due > loop.time():
                self._expiry = loop.call_at(due, self._expire)
                return
            self.counters.idle += 1
            self._end(session)

    def _end(self, session: Session) -> None:
        if session in self._sessions:
            self._unlink(session)
            self._sessions.remove(session)
            self._release_if_over(session.listening)

    def _unlink(self, session: Session) -> None:
        self._unanswered.discard(session)
        if session.link is not None:
            session.link.close()
            session.link = None
        if session.endpoint is not None:
            session.listening.served.ended(session.endpoint)
            session.endpoint = None

    def _take_over(self, listening: Listening, serve: Callable[[], Served]) -> None:
        """Count the sessions that are still there with what serves the place now."""
        now = asyncio.get_running_loop().time()
        for session in listening.sessions.values():
            if session.endpoint is not None:
                listening.served.ended(session.endpoint)
                serve().takes_over(session.host, session.endpoint, now)
        listening.serve = serve

    def _replace(self, listening: Listening, bound: socket.socket) -> None:
        """Take another socket of the same address; what waits in the one before is not lost."""
        for _ in range(MOST_ROUNDS):
            if not self._readable(listening):
                break
        udp_listening.close(listening)
        listening.bound = bound

    def _release_if_over(self, listening: Listening) -> None:
        """Close a place that is not open and has no session left."""
        if listening.is_open or listening.sessions:
            return
        udp_listening.close(listening)
        if self._places.get(listening.place) is listening:
            del self._places[listening.place]

    def _short(self, error: OSError, datagrams: int, now: float) -> None:
        """Count datagrams for which there was nothing to make a session of."""
        self.counters.exhausted += datagrams
        if self._short_at is None or now - self._short_at > LOG_SECONDS:
            log.warning("no session for UDP", why=error.strerror, sessions=len(self._sessions))
        self._short_at = now
