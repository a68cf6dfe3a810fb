"""Workers with real processes: what becomes of those that stop, end or are asked in vain."""

import asyncio
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec import structs

from vipd.backends.usage import Silent
from vipd.backends.userspace import messages, processes, telling, worker
from vipd.backends.userspace.assignment import batches, listeners, served
from vipd.backends.userspace.listeners import holders, listener
from vipd.backends.userspace.messages import (
    MOST_LISTENERS,
    Answer,
    Count,
    Counted,
    Instruction,
    Listen,
    ServedPlace,
    Told,
    place_of,
)
from vipd.backends.userspace.objects import Forwarding, Place
from vipd.backends.userspace.processes import Processes
from vipd.backends.userspace.telling import Telling
from vipd.backends.userspace.workers import Workers
from vipd.proxy.errors import Busy, DataplaneError, UnknownResult
from vipd.proxy.names import Family, Protocol, parse_address
from vipd.proxy.virtualserver import Endpoint

PLACE = Place(Family.IPV4, Protocol.TCP, parse_address("10.96.0.1"), 80)
SERVED = Forwarding(owner="a/b", inside=(Endpoint(parse_address("10.244.0.1"), 80),), outside=())


def local(protocol: Protocol) -> Place:
    """A place of this host where nobody listens now."""
    kind = socket.SOCK_DGRAM if protocol is Protocol.UDP else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as tried:
        tried.bind(("127.0.0.1", 0))
        return Place(Family.IPV4, protocol, parse_address("127.0.0.1"), tried.getsockname()[1])


@pytest_asyncio.fixture
async def two(tmp_path: Path) -> AsyncIterator[Workers]:
    made = Workers(2, tmp_path / "workers")
    await made.complete()
    yield made
    await made.quit()
    assert list((tmp_path / "workers").iterdir()) == []


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - a process ends, which no event here tells
            await asyncio.sleep(0.01)


async def pids(there: Workers) -> set[int]:
    return {one.pid for one in await there.reports()}


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")


@pytest.mark.usefixtures("secret")
async def test_they_have_little_of_the_daemons_surroundings(two: Workers) -> None:
    for pid in await pids(two):
        variables = surroundings(pid)
        assert b"SECRET_TOKEN" not in variables
        assert b"PATH=" in variables
        assert os.readlink(f"/proc/{pid}/cwd") == "/"


def surroundings(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


async def test_an_answer_that_nobody_waits_for_is_not_taken_for_the_next(two: Workers) -> None:
    first = next(iter(two._processes.active.values()))
    os.kill(first.pid, signal.SIGSTOP)
    asking = asyncio.create_task(first.ask(messages.Tell()))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    os.kill(first.pid, signal.SIGCONT)
    answer, _ = await first.ask(Count())
    assert answer == Counted([])


async def test_one_that_does_not_answer_is_killed_and_comes_back(
    two: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await pids(two)
    first = next(iter(two._processes.active.values()))
    os.kill(first.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "PATIENCE_SECONDS", 0.05)
        with pytest.raises(UnknownResult, match="is deaf"):
            await first.ask(Count())
    await until(
        lambda: len(two._processes.active) == 2 and first not in two._processes.active.values()
    )
    after = await pids(two)
    assert len(after) == 2
    assert len(after & before) == 1


async def test_one_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "QUIT_SECONDS", 0.05)
    there = Workers(1, tmp_path / "workers")
    await there.complete()
    (only,) = await pids(there)
    os.kill(only, signal.SIGSTOP)
    assert await there.quit() == 1
    assert not there.running


async def test_paused_workers_are_resumed_and_not_replaced(two: Workers, tmp_path: Path) -> None:
    tcp, udp = local(Protocol.TCP), local(Protocol.UDP)
    await two.serve({tcp: SERVED, udp: SERVED}, ())
    before = await pids(two)
    await two.pause()
    reports = await two.reports()
    assert all(one.retired for one in reports)
    assert {place_of(one.place) for told in reports for one in told.places} == {udp}
    other = Workers(2, tmp_path / "workers")  # as after a restart of the daemon
    await other.complete()
    assert await pids(other) == before
    assert not any(one.retired for one in await other.reports())
    await other.serve({tcp: SERVED, udp: SERVED}, ())
    assert served(await other.reports(), 2) == {tcp: SERVED, udp: SERVED}
    await other.quit()


async def test_a_paused_worker_that_ended_is_started_anew(two: Workers) -> None:
    before = await pids(two)
    await two.pause()
    for one in before:
        os.kill(one, signal.SIGKILL)
    await two.complete()
    assert len(await pids(two) - before) == 2


def told(number: int, *places: tuple[Place, Forwarding]) -> Told:
    reports = [
        ServedPlace(messages.wire_place(place), messages.wire_forwarding(one))
        for place, one in places
    ]
    around = messages.WireSurroundings((), ())
    return Told("", 1, number, False, around, reports)


def test_where_workers_differ_nothing_that_is_wanted_is_served() -> None:
    other = Forwarding(owner="a/b", inside=(), outside=())
    assert served([told(0, (PLACE, SERVED)), told(1, (PLACE, SERVED))], 2) == {PLACE: SERVED}
    for second in (told(1), told(1, (PLACE, other))):
        assert served([told(0, (PLACE, SERVED)), second], 2)[PLACE] not in (SERVED, other)


def test_what_one_worker_remembers_is_served_by_one() -> None:
    alone = Forwarding(owner="a/b", inside=(), outside=(), affinity_seconds=5)
    (owner,) = listeners(PLACE, alone, 2)
    assert served([told(owner, (PLACE, alone)), told(1 - owner)], 2) == {PLACE: alone}
    both = [told(0, (PLACE, alone)), told(1, (PLACE, alone))]
    assert served(both, 2)[PLACE] != alone


def test_no_batch_has_more_listeners_than_can_be_sent() -> None:
    one = Listen(messages.wire_place(PLACE), messages.wire_forwarding(SERVED))
    made = batches([one] * (2 * MOST_LISTENERS + 1))
    assert [len(part) for part in made] == [MOST_LISTENERS, MOST_LISTENERS, 1]
    assert batches([]) == []


async def test_workers_of_another_network_namespace_are_left_alone(
    two: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.Worker, "is_here", False)
    other = Workers(1, tmp_path / "workers")
    assert await other.reports() == []
    assert len(list((tmp_path / "workers").iterdir())) == 2
    assert len(await pids(two)) == 2


async def test_one_that_was_silent_before_the_daemon_is_ended_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "workers"
    before = Workers(1, folder)
    await before.complete()
    (silent,) = await pids(before)
    os.kill(silent, signal.SIGSTOP)
    after = Workers(1, folder)
    monkeypatch.setattr(worker.Worker.find.__func__, "__defaults__", (0.1,))  # type: ignore[attr-defined]
    await after.complete()
    await until(
        lambda: not before.running or silent not in {one.pid for one in before._processes.all()}
    )
    assert silent not in await pids(after)
    await before.quit()
    await after.quit()


async def test_a_silent_one_of_another_network_namespace_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "workers"
    before = Workers(1, folder)
    await before.complete()
    (silent,) = await pids(before)
    os.kill(silent, signal.SIGSTOP)
    try:
        monkeypatch.setattr(worker, "_is_here", lambda pid: False)
        monkeypatch.setattr(worker.Worker.find.__func__, "__defaults__", (0.1,))  # type: ignore[attr-defined]
        assert await Workers(1, folder).reports() == []
        assert [one.stem for one in folder.iterdir()] == [f"0-{silent}"]
    finally:
        os.kill(silent, signal.SIGCONT)
    assert await pids(before) == {silent}
    await before.quit()


async def test_one_whose_channel_is_lost_is_replaced(two: Workers) -> None:
    first = two._processes.active[0]
    first._channel.close()
    with pytest.raises(DataplaneError):
        await first.ask(Count())
    await until(lambda: two._processes.active.get(0) not in {None, first})
    assert len(await pids(two)) == 2


async def test_a_worker_that_returns_and_cannot_listen_leaves_the_place_to_the_others(
    two: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = local(Protocol.TCP)
    assert await two.serve({place: SERVED}, ()) == {}
    before = await pids(two)
    first = two._processes.active[0]
    tries = 0

    def scarce(wanted: Place) -> socket.socket:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise OSError(errno.EMFILE, "too many open files")
        return listener(wanted)

    monkeypatch.setattr(telling, "listener", scarce)
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: tries >= 2)
    assert place in two._processes.active[1].places
    await until(lambda: place in two._processes.active[0].places)
    assert len(await pids(two) & before) == 1
    assert served(await two.reports(), 2) == {place: SERVED}


async def test_a_listener_that_there_is_no_descriptor_for_is_given_again(
    two: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = local(Protocol.TCP), local(Protocol.UDP)
    assert await two.serve({first: SERVED}, ()) == {}
    scarce = errno.EMFILE

    def short(wanted: Place) -> socket.socket:
        if scarce and wanted == second:
            raise OSError(scarce, os.strerror(scarce))
        return listener(wanted)

    monkeypatch.setattr(telling, "listener", short)
    assert await two.serve({second: SERVED}, ()) == {}, "it is not rejected"
    assert [one.missing for one in (await two.usage(())).workers] == [1, 1]
    assert await two.serve({}, (second,)) == {}
    await until(lambda: not two._short)
    assert await two.serve({second: SERVED}, ()) == {}
    scarce = 0
    await until(lambda: not two._short)
    assert [one.missing for one in (await two.usage(())).workers] == [0, 0]
    assert served(await two.reports(), 2) == {first: SERVED, second: SERVED}
    scarce = errno.EADDRINUSE
    assert await two.serve({}, (second,)) == {}
    assert (await two.serve({second: SERVED}, ())).keys() == {second}


ALONE = structs.replace(SERVED, affinity_seconds=60)


def places_of(owners: dict[int, int]) -> Place:
    """A place of which one worker alone has all, whose number is this for so many workers."""
    while True:
        place = local(Protocol.TCP)
        if all(listeners(place, ALONE, count) == (one,) for count, one in owners.items()):
            return place


def inode(place: Place) -> str:
    """The one socket that listens at a place."""
    port = f":{place.port:04X}"
    (found,) = [
        fields[9]
        for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        if (fields := line.split())[1].endswith(port) and fields[3] == "0A"
    ]
    return found


async def test_a_place_of_one_worker_alone_has_a_listener_while_there_get_fewer_and_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "workers"
    gone, moved = places_of({3: 2, 2: 0}), places_of({3: 1, 2: 0})
    wanted = {gone: ALONE, moved: ALONE}
    three = Workers(3, folder)
    await three.complete()
    assert await three.serve(wanted, ()) == {}
    listening: list[set[Place]] = []
    retire = Workers._retire

    async def noted(self: Workers, worker: worker.Worker) -> None:
        listening.append(self._processes.active[0].places & wanted.keys())
        await retire(self, worker)

    monkeypatch.setattr(Workers, "_retire", noted)
    await three._processes.end_restarts()  # as its daemon has ended
    two = Workers(2, folder)
    await two.complete()
    assert listening == [wanted.keys()]
    assert await two.serve(wanted, ()) == {}
    assert served(await two.reports(), 2) == wanted
    await two._processes.end_restarts()
    again = Workers(3, folder)
    await again.complete()
    assert moved in again._processes.active[1].places
    assert moved in again._processes.active[0].places, "until it is told otherwise"
    assert await again.serve(wanted, ()) == {}
    assert served(await again.reports(), 3) == wanted
    await again.quit()


async def test_an_upgrade_hands_over_the_very_socket_of_a_place_that_is_one_worker_s_alone(
    two: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = local(Protocol.TCP)
    assert await two.serve({place: ALONE}, ()) == {}
    before, old = inode(place), await pids(two)
    await two._processes.end_restarts()  # as its daemon has ended
    with socket.create_connection((str(place.address), place.port)):
        monkeypatch.setattr(processes, "VERSION", "9.9")
        other = Workers(2, tmp_path / "workers")
        await other.complete()
        assert {one.pid for one in other._processes.active.values()}.isdisjoint(old)
        assert inode(place) == before
        (owner,) = listeners(place, ALONE, 2)
        assert [one.number for one in other._processes.active.values() if place in one.places] == [
            owner
        ]
    await other.quit()


async def test_nobody_comes_back_after_all_were_told_to_end(tmp_path: Path) -> None:
    there = Workers(2, tmp_path / "workers")
    await there.complete()
    for one in await pids(there):
        os.kill(one, signal.SIGKILL)
    await until(lambda: there._processes._starting)
    await there.quit()
    assert not there.running
    assert not there._processes._tasks
    assert list((tmp_path / "workers").iterdir()) == []


def test_who_has_a_place_is_named_once_for_all() -> None:
    place = local(Protocol.TCP)
    with socket.socket() as theirs:
        theirs.bind((str(place.address), place.port))
        theirs.listen()
        other = place._replace(port=place.port + 1)
        name = Path("/proc/self/comm").read_text().strip()
        assert holders([place, other]) == {place: f"{name} (pid {os.getpid()})"}


@pytest.mark.parametrize("address", ["::", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_a_socket_of_both_families_has_places_of_ipv4(protocol: Protocol, address: str) -> None:
    place = local(protocol)
    kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET6, kind) as theirs:
        theirs.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        theirs.bind((address, place.port))
        if protocol is Protocol.TCP:
            theirs.listen()
        elsewhere = place._replace(address=parse_address("127.0.0.2"))
        name = f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})"
        with pytest.raises(OSError, match="in use"):
            listener(place)
        expected = {place, elsewhere} if address == "::" else {place}
        assert holders([place, elsewhere]) == dict.fromkeys(expected, name)


async def test_one_that_hangs_is_replaced_though_nobody_asks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0.01)
    there = Workers(1, tmp_path / "workers")
    await there.complete()
    first = there._processes.active[0]
    with monkeypatch.context() as patch:
        patch.setattr(worker, "PATIENCE_SECONDS", 0.05)
        os.kill(first.pid, signal.SIGSTOP)
        await until(lambda: there._processes.active.get(0) is not first)
    await until(lambda: 0 in there._processes.active)
    assert await pids(there) != {first.pid}
    await there.quit()


def alive(folder: Path) -> set[int]:
    """Those whose control sockets are there."""
    return {int(one.stem.partition("-")[2]) for one in folder.iterdir()}


async def test_who_asks_while_workers_are_looked_for_waits_for_all_of_them(
    two: Workers, tmp_path: Path
) -> None:
    before = await pids(two)
    await two._processes.end_restarts()  # as its daemon has ended
    other = Workers(2, tmp_path / "workers")
    first = asyncio.create_task(other.usage(()))
    await asyncio.sleep(0)
    await other.complete()
    await first
    assert await pids(other) == before == alive(tmp_path / "workers")
    await other.quit()


async def test_workers_are_looked_for_to_the_end_though_who_asked_has_given_up(
    two: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is silent: it is ended, and the other is taken over."""
    silent, other_one = (one.pid for one in two._processes.active.values())
    await two._processes.end_restarts()
    os.kill(silent, signal.SIGSTOP)
    find = worker.Worker.find

    async def impatient(path: Path) -> worker.Worker:
        return await find(path, 0.05 if path.stem.endswith(f"-{silent}") else 20)

    monkeypatch.setattr(worker.Worker, "find", impatient)
    other = Workers(2, tmp_path / "workers")
    asking = asyncio.create_task(other.usage(()))
    also_asking = asyncio.create_task(other.find())
    for _ in range(10):
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await also_asking
    monkeypatch.undo()
    await other.complete()
    assert other_one in await pids(other)
    await until(lambda: silent not in alive(tmp_path / "workers"))
    assert alive(tmp_path / "workers") == await pids(other)
    await other.quit()


async def test_a_look_for_workers_that_failed_is_repeated(
    two: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await pids(two)
    await two._processes.end_restarts()
    other = Workers(2, tmp_path / "workers")
    find = worker.Worker.find

    async def fails(path: Path) -> worker.Worker:
        if path.name.startswith("1-"):
            raise RuntimeError("never seen")
        return await find(path)

    with monkeypatch.context() as patch:
        patch.setattr(worker.Worker, "find", fails)
        with pytest.raises(RuntimeError, match="never seen"):
            await other.reports()
    assert not other.running
    await other.complete()
    assert await pids(other) == before == alive(tmp_path / "workers")
    await other.quit()


async def test_one_that_nobody_understands_is_ended_and_replaced(
    two: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await pids(two)
    assert await two.serve({local(Protocol.TCP): SERVED}, ()) == {}
    await two._processes.end_restarts()

    def strange(_: object) -> Forwarding:
        raise ValueError("of another version")

    other = Workers(2, tmp_path / "workers")
    with monkeypatch.context() as patch:
        patch.setattr(messages, "forwarding_of", strange)
        await other.find()
    await other.complete()
    assert len(await pids(other) - before) == 2
    assert alive(tmp_path / "workers") == await pids(other)
    await other.quit()


async def test_one_that_ends_while_it_is_replaced_has_one_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, place = tmp_path / "workers", local(Protocol.TCP)
    there = Workers(1, folder)
    await there.complete()
    await there.serve({place: SERVED}, ())
    old = there._processes.active[0]
    old.version = "0.1"
    start = worker.Worker.start

    async def meanwhile(*told: int | Path, transparent: bool) -> worker.Worker:
        old.kill()
        await until(lambda: not there._processes.has(old))
        return await start(*told, transparent=transparent)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.Worker, "start", meanwhile)
    await there.complete()
    await until(lambda: not there._processes._tasks)
    assert alive(folder) == await pids(there) == {there._processes.active[0].pid}
    assert served(await there.reports(), 1) == {place: SERVED}
    await there.quit()
    assert not alive(folder)


async def test_a_successor_that_ends_at_once_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, place = tmp_path / "workers", local(Protocol.TCP)
    there = Workers(1, folder)
    await there.complete()
    await there.serve({place: SERVED}, ())
    old = there._processes.active[0]
    old.version = "0.1"
    start = Processes.start
    made: list[worker.Worker] = []

    async def dying(self: Processes, number: int) -> worker.Worker:
        made.append(await start(self, number))
        made[0].kill()
        await until(lambda: not self.has(made[0]))
        return made[0]

    monkeypatch.setattr(Processes, "start", dying)
    await there.complete()
    await until(lambda: not there._processes._tasks)
    await until(lambda: old not in there._processes.all())
    (now,) = there._processes.active.values()
    assert now not in (old, made[0])
    assert alive(folder) == {now.pid}
    assert served(await there.reports(), 1) == {place: SERVED}
    await there.quit()


async def test_a_number_is_started_by_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Workers(1, tmp_path / "workers")
    starting = asyncio.create_task(there.complete())
    await until(lambda: there._processes._starting)
    for again in (there._processes.start(0), there._processes.resume_or_start(0)):
        with pytest.raises(Busy, match="is being started"):
            await again
    await starting
    assert len(alive(tmp_path / "workers")) == 1
    (before,) = there._processes.active.values()
    after = await there._processes.start(0)
    assert (there._processes.active, there._processes.retired) == ({0: after}, [before])
    assert await there.quit() == 2
    assert not alive(tmp_path / "workers")


async def test_a_start_that_is_given_up_leaves_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "workers"
    starting = asyncio.create_task(worker.Worker.start(0, folder))
    await until(lambda: [one for one in folder.glob("*.sock") if one.stem[2:].isdigit()])
    (pid,) = alive(folder)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert not alive(folder)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_one_that_ends_while_others_are_told_to_pause_is_not_counted(
    two: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two._processes.active.values()
    tell = first.tell

    async def meanwhile(request: messages.Request) -> None:
        second.kill()
        await until(lambda: not two._processes.has(second))
        await tell(request)

    with monkeypatch.context() as patch:
        patch.setattr(first, "tell", meanwhile)
        await two.pause()
    assert two._processes.retired == [first]


async def test_no_change_is_over_before_every_worker_is_through_with_it(
    two: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf, slow = two._processes.active.values()
    place = local(Protocol.TCP)
    do, goes_on, is_there = Telling.do, asyncio.Event(), asyncio.Event()

    async def told(
        self: Telling, one: worker.Worker, instructions: Iterable[Instruction]
    ) -> dict[Place, DataplaneError]:
        if one is deaf:
            raise UnknownResult("deaf")
        is_there.set()
        await goes_on.wait()
        return await do(self, one, instructions)

    monkeypatch.setattr(Telling, "do", told)
    serving = asyncio.create_task(two.serve({place: SERVED}, ()))
    await is_there.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert two._order.locked()
    goes_on.set()
    with pytest.raises(UnknownResult):
        await serving
    assert slow.places == {place}


async def answers_nobody(*_: object) -> tuple[Answer, list[socket.socket]]:
    raise UnknownResult("deaf")


async def test_one_that_is_deaf_keeps_nobody_else_s_counters(
    two: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(two._processes.active[0], "ask", answers_nobody)
        assert [one.number for one in (await two.usage(())).workers] == [1]


async def test_a_retired_one_that_is_deaf_keeps_no_report_back(
    two: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two._processes.active.values()
    first.retired = True
    with monkeypatch.context() as patch:
        patch.setattr(first, "ask", answers_nobody)
        assert await pids(two) == {second.pid}
        first.retired = False
        with pytest.raises(UnknownResult):
            await two.reports()


async def test_one_that_is_silent_keeps_nobody_from_hearing_the_others(
    two: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "REPORT_SECONDS", 0.5)
    first, second = two._processes.active[0], two._processes.active[1]
    os.kill(first.pid, signal.SIGSTOP)
    try:
        told = await two.usage(())
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert told.silent == (Silent(0, first.pid),)
    assert [(one.number, one.files) for one in told.workers] == [(1, second.files)]
    assert (told.wanted, second.files > 0) == (2, True)


async def test_one_that_may_open_fewer_files_than_a_new_one_is_replaced(
    two: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await pids(two)
    await two._processes.end_restarts()  # as its daemon has ended
    same = Workers(2, tmp_path / "workers")
    await same.complete()
    assert await pids(same) == before
    await same._processes.end_restarts()
    files = same._processes.active[0].files
    monkeypatch.setattr(processes, "allowed_descriptors", lambda wanted: files + 1)
    more = Workers(2, tmp_path / "workers")
    await more.complete()
    after = {one.pid for one in more._processes.active.values()}
    assert after.isdisjoint(before)
    await more.complete()
    assert {one.pid for one in more._processes.active.values()} == after, "replaced once"
    await more.quit()
