"""A worker: how it shares out its descriptors, and what it does while connections wait."""

import asyncio
import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vipd.backends import log
from vipd.backends.userspace import messages
from vipd.backends.userspace.channel import Channel
from vipd.backends.userspace.forwarder import turns
from vipd.backends.userspace.forwarder import worker as process
from vipd.backends.userspace.forwarder.descriptors import (
    RESERVE,
    WANTED,
    may_listen,
    reserve,
    shares,
)
from vipd.backends.userspace.forwarder.on_demand import OnDemand
from vipd.backends.userspace.forwarder.tcp_limits import TcpLimits
from vipd.backends.userspace.forwarder.udp_sessions import UdpLimits
from vipd.backends.userspace.forwarder.worker import Worker
from vipd.backends.userspace.listeners import listener
from vipd.backends.userspace.messages import Batch, Listen
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.backends.userspace.workers import Workers
from vipd.proxy.names import Family, Protocol, parse_address
from vipd.proxy.virtualserver import Endpoint

MOST_SESSIONS = UdpLimits().most
NOWHERE = messages.wire_forwarding(Forwarding(owner="a/b:c", inside=(), outside=()))


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Take away what this process may still open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def daemon_of(worker: Worker, folder: Path) -> AsyncIterator[Channel]:
    """Let a worker answer whoever connects, and be the first."""
    with socket.socket(socket.AF_UNIX) as control, socket.socket(socket.AF_UNIX) as daemon:
        control.bind(str(folder / "control"))
        control.listen()
        answering = asyncio.create_task(worker.answer_daemons(control))
        try:
            daemon.connect(str(folder / "control"))
            yield Channel(daemon)
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            await worker.close()


def free_place(protocol: Protocol) -> Place:
    kind = socket.SOCK_DGRAM if protocol is Protocol.UDP else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as found:
        found.bind(("127.0.0.1", 0))
        return Place(Family.IPV4, protocol, parse_address("127.0.0.1"), found.getsockname()[1])


@given(most=st.integers(64, 1 << 20), listeners=st.integers(0, 1 << 17))
def test_nothing_that_grows_under_load_touches_listeners_or_the_reserve(
    most: int, listeners: int
) -> None:
    found = shares(most, listeners, MOST_SESSIONS)
    assert found.connections >= 1
    assert 1 <= found.sessions <= MOST_SESSIONS
    taken = listeners + 2 * found.connections + found.sessions
    if listeners <= most - reserve(most) - 3:  # else one of each is all there is
        assert taken <= most - reserve(most)


@given(most=st.integers(64, 1 << 20), listeners=st.integers(0, 1 << 17))
def test_more_listeners_never_leave_more_for_others(most: int, listeners: int) -> None:
    before, after = (shares(most, one, MOST_SESSIONS) for one in (listeners, listeners + 1))
    assert after.connections <= before.connections
    assert after.sessions <= before.sessions


def test_what_a_worker_wants_is_enough_for_all_its_bounds_and_many_listeners() -> None:
    found = shares(WANTED, 100_000, MOST_SESSIONS)
    assert found.connections >= TcpLimits().most
    assert found.sessions == MOST_SESSIONS


@pytest.mark.parametrize("listeners", [10_000, 15_000])
def test_ten_thousand_services_work_within_20_000_descriptors(listeners: int) -> None:
    found = shares(20_000, listeners, MOST_SESSIONS)
    assert found.connections > 1000
    assert found.sessions > 1000


def test_a_listener_is_refused_before_the_reserve_is_touched() -> None:
    assert may_listen(20_000, 20_000 - RESERVE - 1)
    assert not may_listen(20_000, 20_000 - RESERVE)


def test_limits_of_sessions_keep_their_shares() -> None:
    limits = UdpLimits(most=800, most_of_place=600, most_of_client=200)
    assert limits.within(900) is limits
    fewer = limits.within(80)
    assert (fewer.most, fewer.most_of_place, fewer.most_of_client) == (80, 60, 20)
    assert fewer.idle_seconds == limits.idle_seconds
    fewest = limits.within(1)
    assert (fewest.most, fewest.most_of_place, fewest.most_of_client) == (1, 1, 1)


async def test_a_worker_refuses_a_listener_that_it_has_no_descriptor_for() -> None:
    worker = Worker(0, 8)  # of which two are the reserve
    places = [free_place(one) for one in (Protocol.TCP, Protocol.UDP) for _ in range(5)]
    given = [listener(one) for one in places]
    told = [Listen(messages.wire_place(one), NOWHERE) for one in places]
    try:
        done = await worker._batch(Batch(1, list(told)), given)
        why = os.strerror(errno.EMFILE)
        assert done.short == [(one.place, why) for one in told[6:]]
        assert [one.fileno() for one in given[6:]] == [-1] * 4
    finally:
        await worker.close()


async def test_a_worker_gives_to_connections_and_sessions_what_listeners_leave() -> None:
    worker = Worker(0, 4096)
    there = worker._tcp._accepting.most, worker._udp._sessions.limits.most
    assert there == ((4096 - RESERVE) * 3 // 8, (4096 - RESERVE) // 4)
    place = free_place(Protocol.TCP)
    more = [free_place(Protocol.UDP) for _ in range(7)]
    told = [Listen(messages.wire_place(one), NOWHERE) for one in (place, *more)]
    await worker._batch(Batch(1, list(told)), [listener(one) for one in (place, *more)])
    assert worker._tcp._accepting.most == there[0] - 3
    assert worker._udp._sessions.limits.most == there[1] - 2
    stopped = messages.Stop(messages.wire_place(place))
    await worker._batch(
        Batch(2, [stopped, *(messages.Stop(messages.wire_place(one)) for one in more)]), []
    )
    assert (worker._tcp._accepting.most, worker._udp._sessions.limits.most) == there
    await worker.close()


async def test_a_worker_without_descriptors_answers_the_daemon_when_it_has_some_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "PAUSE_SECONDS", 0.01)
    logs: list[str] = []
    monkeypatch.setattr(log, "write", logs.append)
    worker = Worker(0, 1024)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "control"))
        control.listen()
        answering = asyncio.create_task(worker.answer_daemons(control))
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(str(tmp_path / "control"))
            with no_descriptors_left():
                async with asyncio.timeout(20):
                    while not logs:  # noqa: ASYNC110 - a line of the log has no event
                        await asyncio.sleep(0)
            assert "Too many open files" in logs[0]
            channel = Channel(daemon)
            await channel.send(messages.encode(messages.Tell()))
            told = messages.answer_of((await channel.receive())[0])
            assert isinstance(told, messages.Told)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
    await worker.close()


def told_of(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}", name).read_text()


async def test_a_worker_is_small_and_may_open_as_much_as_the_host_allows(tmp_path: Path) -> None:
    made = Workers(1, tmp_path / "workers")
    await made.complete()
    try:
        (pid,) = [one.pid for one in await made.reports()]
        assert "libcrypto" not in told_of(pid, "maps")
        assert "libssl" not in told_of(pid, "maps")
        limits = next(
            line for line in told_of(pid, "limits").splitlines() if line.startswith("Max open")
        )
        soft, hard = map(int, limits.split()[3:5])
        assert soft in (hard, WANTED)
    finally:
        await made.quit()


@contextmanager
def counted_turns() -> Iterator[list[int]]:
    """Count how often others had their turn: the one number in the list."""
    counts = [0]
    asked: asyncio.Handle

    def turn() -> None:
        nonlocal asked
        counts[0] += 1
        asked = asyncio.get_running_loop().call_soon(turn)

    asked = asyncio.get_running_loop().call_soon(turn)
    try:
        yield counts
    finally:
        asked.cancel()


async def test_connections_have_their_turn_while_many_places_change() -> None:
    worker = Worker(0, 1024)
    place = messages.wire_place(free_place(Protocol.TCP))
    changes = [messages.Change(place, NOWHERE)] * (3 * turns.AT_ONCE)
    with counted_turns() as counts:
        done = await worker._batch(Batch(1, list(changes)), [])
    assert len(done.failed) == 3 * turns.AT_ONCE
    assert counts[0] >= 3
    await worker.close()


def forwarding(*ports: int) -> Forwarding:
    endpoints = tuple(Endpoint(parse_address("10.244.0.1"), port) for port in ports)
    return Forwarding(owner="a/b:c", inside=endpoints, outside=endpoints)


def test_the_state_of_a_place_is_made_when_a_client_comes_and_follows_changes_then() -> None:
    place = Place(Family.IPV4, Protocol.TCP, parse_address("10.96.0.1"), 80)
    first, second, third = (messages.wire_forwarding(forwarding(one)) for one in (1, 2, 3))
    there = OnDemand(place, first, Surroundings(), lambda: 0.0)
    there.change(second, Surroundings())
    assert (there.told, there.made) == (second, None)
    served = there.serve()
    assert served.forwarding == forwarding(2)
    served.began("10.0.0.1", forwarding(2).inside[0], 0.0)
    there.change(third, Surroundings())
    assert there.serve() is served
    assert served.forwarding == forwarding(3)
    assert [one.connections for one in served.told().endpoints if one.departed] == [1]


async def test_a_worker_says_what_it_was_told_though_nobody_has_come() -> None:
    worker = Worker(0, 1024)
    place = free_place(Protocol.TCP)
    wire = messages.wire_place(place)
    told = messages.wire_forwarding(forwarding(1, 2))
    await worker._batch(Batch(1, [Listen(wire, told)]), [listener(place)])
    assert [(one.place, one.forwarding) for one in (await worker._told()).places] == [(wire, told)]
    (report,) = worker._reported(messages.Report([wire], "10.0.0.1")).places
    assert (report.listens, report.connections, report.endpoints) == (True, 0, [])
    assert worker._served[place].made is None
    await worker.close()


async def test_a_socket_that_comes_blocking_does_not_stop_the_worker(tmp_path: Path) -> None:
    worker = Worker(0, 1024)
    async with daemon_of(worker, tmp_path) as channel:
        places = [free_place(one) for one in (Protocol.TCP, Protocol.UDP)]
        given = [listener(one) for one in places]
        for one in given:
            one.setblocking(True)
        told = [Listen(messages.wire_place(one), NOWHERE) for one in places]
        await channel.send(messages.encode(Batch(1, list(told))), [one.fileno() for one in given])
        async with asyncio.timeout(20):
            assert messages.answer_of((await channel.receive())[0]) == messages.Done(1, [])
        assert [os.get_blocking(one.fileno()) for one in given] == [False, False]
        for one in given:
            one.close()


async def test_a_request_that_fails_inside_ends_its_channel_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logs: list[str] = []
    monkeypatch.setattr(log, "write", logs.append)
    worker = Worker(0, 1024)
    tell = messages.encode(messages.Tell())
    async with daemon_of(worker, tmp_path) as channel, asyncio.timeout(20):
        with monkeypatch.context() as broken:
            broken.setattr(worker, "_told", None)
            await channel.send(tell)
            with pytest.raises(EOFError):
                await channel.receive()
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(str(tmp_path / "control"))
            again = Channel(daemon)
            await again.send(tell)
            assert isinstance(messages.answer_of((await again.receive())[0]), messages.Told)
    (line,) = logs
    assert 'event="a request failed inside"' in line


async def test_an_operation_that_fails_is_answered_for_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logs: list[str] = []
    monkeypatch.setattr(log, "write", logs.append)
    worker = Worker(0, 1024)
    places = [free_place(Protocol.TCP) for _ in range(2)]
    told = [Listen(messages.wire_place(one), NOWHERE) for one in places]
    nonsense = messages.Cut(told[0].place, ("nowhere", 1, 1))
    unknown = messages.Change(told[1].place, NOWHERE)
    given = [listener(places[0])]
    broken = [KeyError("never")]

    def listen(*_: object) -> None:
        raise broken.pop()

    with monkeypatch.context() as patched:
        patched.setattr(worker._tcp, "listen", listen)
        done = await worker._batch(Batch(1, [told[0], nonsense, unknown]), given)
    assert [place for place, _ in done.failed] == [told[0].place, told[0].place, told[1].place]
    assert given[0].fileno() == -1
    assert len(logs) == 1
    assert await worker._batch(Batch(2, list(told)), [listener(one) for one in places]) == (
        messages.Done(2, [])
    )
    await worker.close()


async def test_listeners_that_were_lost_on_their_way_are_told() -> None:
    worker = Worker(0, 1024)
    places = [free_place(Protocol.TCP) for _ in range(3)]
    told = [Listen(messages.wire_place(one), NOWHERE) for one in places]
    done = await worker._batch(Batch(1, list(told)), [listener(places[0])])
    assert [place for place, _ in done.short] == [one.place for one in told[1:]]
    assert "lost" in done.short[0][1]
    assert done.failed == []
    assert list(worker._served) == places[:1]
    await worker.close()


async def test_a_worker_ends_where_no_daemon_can_come_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logs: list[str] = []
    monkeypatch.setattr(log, "write", logs.append)
    with socket.socket(socket.AF_UNIX) as deaf:  # it does not listen
        async with asyncio.timeout(20):
            await process.run(0, deaf, 1024)
    (line,) = logs
    assert 'event="no daemon is answered any more"' in line


@pytest.mark.parametrize("request_", [messages.Retire(), messages.Pause()])
async def test_connections_have_their_turn_while_listeners_are_closed(
    request_: messages.Request,
) -> None:
    worker = Worker(0, 1024)
    anywhere = Place(Family.IPV4, Protocol.TCP, parse_address("127.0.0.1"), 0)
    # All at once: a port that is free again could come twice, which would be one place less.
    given = [listener(anywhere) for _ in range(3 * turns.AT_ONCE)]
    places = [anywhere._replace(port=one.getsockname()[1]) for one in given]
    told = [Listen(messages.wire_place(one), NOWHERE) for one in places]
    done = await worker._batch(Batch(1, list(told)), given)
    assert (done.failed, len(worker._served)) == ([], 3 * turns.AT_ONCE)
    with counted_turns() as counts:
        await worker._do(request_, iter(()))
    assert counts[0] >= 3
    assert not worker._served
    await worker.close()


async def test_a_place_of_udp_that_stops_at_once_keeps_no_session() -> None:
    worker = Worker(0, 1024)
    place = free_place(Protocol.UDP)
    wire = messages.wire_place(place)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as endpoint,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        endpoint.bind(("127.0.0.1", 0))
        at = Endpoint(parse_address("127.0.0.1"), endpoint.getsockname()[1])
        there = Forwarding(owner="a/b:c", inside=(at,), outside=(at,))
        told = messages.wire_forwarding(there)
        await worker._batch(Batch(1, [Listen(wire, told)]), [listener(place)])
        client.sendto(b"x", (str(place.address), place.port))
        async with asyncio.timeout(20):
            while not worker._udp.sessions():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0)
        await worker._batch(Batch(2, [messages.Change(wire, NOWHERE)]), [])
        await worker._batch(Batch(3, [messages.Stop(wire, at_once=True)]), [])
        assert worker._udp.sessions() == {}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind((str(place.address), place.port))
    await worker.close()


async def test_a_client_whose_endpoint_is_being_connected_keeps_a_retired_worker() -> None:
    worker = Worker(0, 1024)
    place = free_place(Protocol.TCP)
    with socket.socket() as silent, socket.socket() as first, socket.socket() as second:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for one in (first, second):  # its queue is full
            one.setblocking(False)
            one.connect_ex(silent.getsockname())
        at = Endpoint(parse_address("127.0.0.1"), silent.getsockname()[1])
        told = messages.wire_forwarding(Forwarding(owner="a/b:c", inside=(at,), outside=(at,)))
        wire = messages.wire_place(place)
        await worker._batch(Batch(1, [Listen(wire, told)]), [listener(place)])
        with socket.create_connection((str(place.address), place.port)):
            await worker._do(messages.Retire(), iter(()))
            assert worker._open() == [(wire, 1)]
            assert not worker.over.is_set()
            await worker.close()
