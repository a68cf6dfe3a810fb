"""DNS workers with real processes: fed, killed, deaf, and relieved by those of the next daemon."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from tests.unit.dns_daemon import NAME, SETTINGS, Daemon, has_ended, shown, status_of, until, web
from tests.unit.dns_server import WEB, Datagrams, Stream, addresses, question, rcode

from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.server import messages, process
from vipd.dns.server.service import leftovers
from vipd.dns.settings import DnsSettings
from vipd.proxy.errors import ConfigError
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
    (told,) = await daemon.service.told()
    assert told.types == {"udp 1 AAAA": 5}
    assert told.rcodes == {"NOERROR": 5}
    assert (sum(told.durations), sum(told.request_sizes["udp"])) == (5, 5)
    assert (told.services, told.synced, told.stale_seconds) == (1, True, None)
    assert told.counters["udp_dropped_full"] == 0
    client.close()
    await daemon.service.stop()
