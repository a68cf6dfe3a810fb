"""DNS workers with real processes: fed, killed, deaf, and relieved by those of the next daemon."""

import asyncio
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import dns.message
import msgspec
import pytest
import pytest_asyncio
from msgspec import structs
from structlog.testing import capture_logs
from tests.unit.dns_daemon import NAME, SETTINGS, Daemon, has_ended, shown, status_of, web
from tests.unit.dns_server import WEB, Datagrams, Stream, addresses, question, rcode
from tests.waiting import until

from vipd.dns.feed import Kept, Portion, Untold
from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.server import messages, process, service
from vipd.dns.server.service import leftovers
from vipd.dns.settings import DnsSettings
from vipd.proxy.errors import Busy, ConfigError
from vipd.proxy.events import Deleted, Kind, Synced


@pytest_asyncio.fixture
async def state(tmp_path: Path) -> AsyncIterator[Path]:
    """A state folder; what is left in it is ended."""
    yield tmp_path
    await leftovers(tmp_path, remove=True)


async def test_it_answers_what_it_was_told() -> None:
    daemon = await Daemon(SETTINGS, None).start(web("10.96.0.1"), Synced())
    client = Datagrams(daemon.address)
    assert addresses(await client.ask(question())) == ["10.96.0.1"]
    stream = await Stream.to(daemon.address)
    assert addresses(await stream.ask(question())) == ["10.96.0.1"]
    daemon.take(web("10.96.0.2"))
    await shown(client, "10.96.0.2")
    daemon.take(Deleted(Kind.SERVICE, NAME))
    await shown(client, "")
    pid = await daemon.pid()
    await stream.close()
    client.close()
    await daemon.service.stop()
    assert has_ended(pid)


def surroundings(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


async def test_it_has_little_of_the_daemons_surroundings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.chdir(tmp_path)
    forward = ForwardSettings(resolv_conf="", hosts_file="hosts")
    settings = msgspec.structs.replace(SETTINGS, forwards=True, forward=forward)
    daemon = await Daemon(settings, None).start(Synced())
    pid = await daemon.pid()
    variables = surroundings(pid)
    assert b"LANG=C.UTF-8" in variables
    assert not any(one.startswith(b"SECRET_TOKEN") for one in variables)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert daemon.service.settings.forward.hosts_file == str(tmp_path / "hosts")
    await daemon.service.stop()


async def test_before_the_first_sync_it_does_not_know() -> None:
    daemon = await Daemon(SETTINGS, None).start()
    client = Datagrams(daemon.address)
    assert rcode(await client.ask(question())) == "SERVFAIL"
    daemon.take(web("10.96.0.1"))
    assert rcode(await client.ask(question("other.default.svc.cluster.local."))) == "SERVFAIL"
    daemon.take(Synced())
    await daemon.service.in_step()
    assert addresses(await client.ask(question())) == ["10.96.0.1"]
    client.close()
    await daemon.service.stop()


async def test_it_has_no_privileges() -> None:
    daemon = await Daemon(SETTINGS, None).start(Synced())
    status = status_of(await daemon.pid())
    assert "CapEff:\t0000000000000000" in status
    assert "CapBnd:\t0000000000000000" in status or os.geteuid() != 0
    assert "NoNewPrivs:\t1" in status
    await daemon.service.stop()


async def test_killed_it_is_back_and_no_question_is_lost() -> None:
    daemon = await Daemon(SETTINGS, None).start(web("10.96.0.1"), Synced())
    client = Datagrams(daemon.address)
    await shown(client, "10.96.0.1")
    before = await daemon.pid()
    os.kill(before, signal.SIGKILL)
    await until(lambda: has_ended(before))
    assert addresses(await client.ask(question())) == ["10.96.0.1"]  # it waited in the socket
    stream = await Stream.to(daemon.address)
    assert addresses(await stream.ask(question())) == ["10.96.0.1"]
    assert daemon.service.restarts == 1
    assert await daemon.pid() != before
    await stream.close()
    client.close()
    await daemon.service.stop()


async def test_all_workers_tell_one_serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is when names were changed, not when a worker was told of it."""
    clock = SimpleNamespace(time=lambda: 1_700_000_000.5)
    monkeypatch.setattr(service, "time", clock)
    settings = structs.replace(SETTINGS, workers=2)
    daemon = await Daemon(settings, None).start(web("10.96.0.1"), Synced())
    first, second = await daemon.service.told()
    assert (first.serial, second.serial) == (1_700_000_000, 1_700_000_000)
    os.kill(second.pid, signal.SIGKILL)
    await until(lambda: daemon.service.restarts)
    await daemon.service.in_step()
    assert [one.serial for one in await daemon.service.told()] == [1_700_000_000] * 2
    clock.time = lambda: 1_700_000_009.0
    await daemon.service.change(structs.replace(settings, ttl=9))
    await daemon.service.in_step()
    assert [one.serial for one in await daemon.service.told()] == [1_700_000_009] * 2
    await daemon.service.stop()


async def test_one_that_is_deaf_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = await Daemon(SETTINGS, None).start(web("10.96.0.1"), Synced())
    client = Datagrams(daemon.address)
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 0.2)
    os.kill(await daemon.pid(), signal.SIGSTOP)
    daemon.take(web("10.96.0.2"))
    await until(lambda: daemon.service.restarts)
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 20.0)
    await shown(client, "10.96.0.2")
    client.close()
    await daemon.service.stop()


async def test_a_daemon_out_of_descriptors_starts_it_when_it_has_some() -> None:
    daemon = await Daemon(SETTINGS, None).start(web("10.96.0.1"), Synced())
    pid = await daemon.pid()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with capture_logs() as logs:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            os.kill(pid, signal.SIGKILL)
            await until(lambda: any("can be started" in one.get("why", "") for one in logs))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    client = Datagrams(daemon.address)
    await shown(client, "10.96.0.1")
    client.close()
    await daemon.service.stop()


async def test_an_error_of_the_daemon_does_not_leave_a_worker_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon = await Daemon(SETTINGS, None).start(web("10.96.0.1"), Synced())
    before, portion = await daemon.pid(), Untold.portion

    def fail(self: Untold, kept: Kept) -> Portion:
        monkeypatch.setattr(Untold, "portion", portion)
        raise RuntimeError("nobody expected this")

    monkeypatch.setattr(Untold, "portion", fail)
    daemon.take(web("10.96.0.2"))
    client = Datagrams(daemon.address)
    await shown(client, "10.96.0.2")
    assert await daemon.pid() != before
    client.close()
    await daemon.service.stop()


async def test_a_worker_that_nobody_tells_changes_is_not_called_well() -> None:
    """`vipd status` says degraded where fewer workers are told of than are wanted."""
    daemon = await Daemon(SETTINGS, None).start(web("10.96.0.1"), Synced())
    assert len(await daemon.service.told()) == 1
    (seat,) = daemon.service._workers._seats
    assert seat.task is not None
    seat.task.cancel()
    await asyncio.wait((seat.task,))
    assert await daemon.service.told() == []
    await daemon.service.stop()


async def test_more_sockets_than_one_message_carries(state: Path) -> None:
    """64 addresses of three workers are 384 sockets, given to one, and taken over from it."""
    listen = tuple(f"127.0.0.{at + 1}:0" for at in range(64))
    daemon = await Daemon(
        DnsSettings(listen=listen, http=(), workers=3, forwards=False), state
    ).start(web("10.96.0.1"), Synced())
    places = daemon.service.listens
    for change in ("10.96.0.2", "10.96.0.3"):
        await daemon.service.stop()
        settings = DnsSettings(listen=tuple(map(str, places)), http=(), forwards=False)
        daemon = await Daemon(settings, state).start(web(change), Synced())
        (told,) = await daemon.service.told()
        assert len(told.listens) == 192
        for place in (places[0], places[-1]):
            client = Datagrams((str(place.address), place.port))
            await shown(client, change)
            client.close()
    await daemon.service.stop()


async def test_a_worker_cannot_be_killed_in_the_name_of_another(tmp_path: Path) -> None:
    """It has no privileges, and whoever starts it has: it says an id that is not its own."""
    path = tmp_path / "0-liar.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.bind(str(path))
        control.listen()

        def lie() -> None:
            connection, _ = control.accept()
            with connection:
                connection.recv(512)
                said = messages.encode(messages.Met("0", os.getppid(), 0, retired=False))
                connection.sendall(len(said).to_bytes(4) + b"\0" + said)

        lying = asyncio.ensure_future(asyncio.to_thread(lie))
        with pytest.raises(Busy, match=f"pid {os.getpid()} said .*pid={os.getppid()}"):
            await process.Process.find(path)
        await lying


async def test_it_goes_on_without_the_daemon(state: Path) -> None:
    daemon = await Daemon(SETTINGS, state).start(web("10.96.0.1"), Synced())
    pid, address = await daemon.pid(), daemon.address
    await daemon.service.stop()
    client = Datagrams(address)
    assert addresses(await client.ask(question())) == ["10.96.0.1"]
    client.close()
    (one,) = await process_of(state)
    told, _ = await one.ask(messages.Tell())
    assert isinstance(told, messages.Told)
    assert told.stale_seconds is not None
    assert told.synced
    one.forget()
    assert await leftovers(state, remove=False) == [f"DNS worker (pid {pid})"]
    assert await leftovers(state, remove=True) == [f"DNS worker (pid {pid})"]
    assert await leftovers(state, remove=True) == []
    assert not (state / "dns").exists()


async def process_of(state: Path) -> list[process.Process]:
    paths = sorted((state / "dns").glob("*.sock"))
    return [await process.Process.find(path) for path in paths]


async def test_the_next_daemon_takes_over_without_a_gap(state: Path) -> None:
    first = await Daemon(SETTINGS, state).start(web("10.96.0.1"), Synced())
    address, before = first.address, await first.pid()
    replies: list[str] = []
    over = asyncio.Event()

    async def ask() -> None:
        client = Datagrams(address)
        while not over.is_set():
            replies.append(rcode(await client.ask(question())))
        client.close()

    async def connect() -> None:
        while not over.is_set():
            stream = await Stream.to(address)
            replies.append(rcode(await stream.ask(question())))
            await stream.close()

    asking = [asyncio.ensure_future(ask()), asyncio.ensure_future(connect())]
    await first.service.stop()
    settings = DnsSettings(listen=(f"{address[0]}:{address[1]}",), http=(), ttl=7, forwards=False)
    second = await Daemon(settings, state).start()
    await asyncio.sleep(0.05)  # questions are answered while nothing is known
    second.take(web("10.96.0.2"), Synced())
    await second.service.in_step()
    await until(lambda: has_ended(before))
    over.set()
    await asyncio.gather(*asking)
    assert set(replies) == {"NOERROR"}
    assert len(replies) > 20
    client = Datagrams(address)
    assert addresses(await client.ask(question())) == ["10.96.0.2"]
    client.close()
    await second.service.stop()


async def test_another_number_of_workers(state: Path) -> None:
    first = await Daemon(SETTINGS, state).start(web("10.96.0.1"), Synced())
    listen = (f"{first.address[0]}:{first.address[1]}",)
    await first.service.stop()
    for count in (3, 1):
        settings = DnsSettings(listen=listen, http=(), workers=count, forwards=False)
        daemon = await Daemon(settings, state).start(web("10.96.0.1"), Synced())
        assert len(await daemon.service.told()) == count
        clients = [Datagrams(daemon.address) for _ in range(30)]  # each to any of the sockets
        for client in clients:
            assert addresses(await client.ask(question())) == ["10.96.0.1"]
            client.close()
        await daemon.service.stop()


async def test_no_dns_ends_what_there_was(state: Path) -> None:
    first = await Daemon(SETTINGS, state).start(Synced())
    pid = await first.pid()
    await first.service.stop()
    second = await Daemon(DnsSettings(), state).start(Synced())
    await until(lambda: has_ended(pid))
    await second.service.stop()


async def test_an_address_that_is_taken() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        settings = DnsSettings(listen=(f"127.0.0.1:{port}",))
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}.*in use.*pid {os.getpid()}"):
            await Daemon(settings, None).start()


async def test_what_is_counted_is_told() -> None:
    daemon = await Daemon(SETTINGS, None).start(web("10.96.0.1"), Synced())
    client = Datagrams(daemon.address)
    for _ in range(5):
        await client.ask(question(WEB, "AAAA"))
    await client.ask(dns.message.make_query(WEB, "AAAA", use_edns=1).to_wire())
    (told,) = await daemon.service.told()
    assert told.types == {"udp 1 AAAA": 6}
    assert told.rcodes == {"NOERROR": 5, "BADVERS": 1}
    assert (sum(told.durations), sum(told.request_sizes["udp"])) == (6, 6)
    assert (told.services, told.synced, told.stale_seconds) == (1, True, None)
    assert told.counters["udp_dropped_full"] == 0
    client.close()
    await daemon.service.stop()
