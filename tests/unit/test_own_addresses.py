"""This node's own addresses, from the kernel to the event and from the event to the table."""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from ipaddress import ip_address
from types import SimpleNamespace

import pytest

from vipd.backends import netlink
from vipd.backends.netlink import MULTI, Netlink
from vipd.proxy.errors import SourceError, UnknownResult
from vipd.proxy.events import Event, OwnAddresses
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources import addresses
from vipd.proxy.sources.addresses import FollowedAddresses, events, read

SETTINGS = NodeSettings(node_name="node", node_ips=(ip_address("192.168.0.1"),))
NLM_F_DUMP_INTR = 0x10
ADDRESSES = (ip_address("192.168.0.1"), ip_address("fd00::1"))


def test_they_stand_in_the_network_of_the_table() -> None:
    empty = Snapshot()
    snapshot, touched = fold(empty, [OwnAddresses(ADDRESSES)])
    assert touched.own_addresses
    table, changes = update(resolve(empty, SETTINGS), snapshot, SETTINGS, touched)
    assert table.network.own_addresses == ADDRESSES
    assert table.network.primary_addresses == SETTINGS.node_ips
    assert changes.network == table.network
    assert table == resolve(snapshot, SETTINGS)


def test_told_twice_they_touch_nothing() -> None:
    snapshot, _ = fold(Snapshot(), [OwnAddresses(ADDRESSES)])
    again, touched = fold(snapshot, [OwnAddresses(ADDRESSES)])
    assert again == snapshot
    assert not touched.own_addresses


# The source


@pytest.fixture
def socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends: what comes in at the first is sent at the second, one message at a time."""
    watching, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    watching.setblocking(False)
    with watching, kernel:
        yield watching, kernel


def test_a_list_that_changed_while_it_was_made_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever cannot have one in peace is told so."""
    asked: list[bytes] = []

    class Interrupted(Netlink):
        def ask(self, message: bytes) -> list[bytes]:
            asked.append(message)
            answers = super().ask(message)
            flags = MULTI | NLM_F_DUMP_INTR
            return [one[:6] + flags.to_bytes(2, "little") + one[8:] for one in answers]

    monkeypatch.setattr(netlink, "routes", lambda: Interrupted(socket.NETLINK_ROUTE))
    with pytest.raises(SourceError, match="faster than they can be read"):
        read()
    assert len(asked) > 1


def test_a_listing_that_is_refused_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> Netlink:
        raise OSError(errno.EMFILE, "too many files")

    monkeypatch.setattr(netlink, "routes", refused)
    with pytest.raises(SourceError, match="too many files"):
        read()


async def test_what_cannot_be_read_now_is_read_later(
    monkeypatch: pytest.MonkeyPatch, socket_pair: tuple[socket.socket, socket.socket]
) -> None:
    """Whether it is the subscription or the listing that fails, or the watch once it runs."""
    asked: list[str] = []
    deaf = socket.socket()  # not connected: every attempt to read fails
    deaf.setblocking(False)
    sockets: list[socket.socket | None] = [None, deaf, socket_pair[0]]

    def subscribe() -> socket.socket:
        asked.append("subscribe")
        if (one := sockets.pop(0)) is None:
            raise OSError(errno.EMFILE, "too many")
        return one

    answers: list[OwnAddresses | Exception] = [
        OwnAddresses(ADDRESSES[:1]),
        SourceError("dump interrupted"),
        OwnAddresses(ADDRESSES),
    ]

    def answer() -> OwnAddresses:
        asked.append("read")
        one = answers.pop(0)
        if isinstance(one, Exception):
            sockets.insert(0, socket_pair[0].dup())
            raise one
        return one

    monkeypatch.setattr(addresses, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(addresses, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(addresses, "_subscribe", subscribe)
    monkeypatch.setattr(addresses, "read", answer)
    async with asyncio.timeout(20):
        found = []
        async for (one,) in events():
            found.append(one.addresses)
            if len(found) == 2:
                break
    assert found == [ADDRESSES[:1], ADDRESSES]
    assert asked == ["subscribe", "subscribe", "read", "subscribe", "read", "subscribe", "read"]


async def test_more_changes_than_the_socket_holds_are_a_change(
    monkeypatch: pytest.MonkeyPatch, socket_pair: tuple[socket.socket, socket.socket]
) -> None:
    watching, kernel = socket_pair
    monkeypatch.setattr(addresses, "QUIET_SECONDS", 0.0)
    overflow = [OSError(errno.ENOBUFS, "No buffer space available")]

    def recv(size: int) -> bytes:
        if overflow:
            raise overflow.pop()
        return watching.recv(size)

    kernel.send(b"one")
    kernel.send(b"two")
    wrapped = SimpleNamespace(
        recv=recv, fileno=watching.fileno, gettimeout=watching.gettimeout, _sock=watching
    )
    async with asyncio.timeout(20):
        await addresses._change(wrapped)  # type: ignore[arg-type]
    with pytest.raises(BlockingIOError):
        watching.recv(1)


def event(interface: int) -> bytes:
    body = struct.pack("=BBBBI", socket.AF_INET6, 128, 0, 0, interface)
    return netlink.HEADER.pack(netlink.HEADER.size + len(body), 20, 0, 0, 0) + body


@pytest.mark.parametrize("told", [event(2), event(1) + event(2), b"who knows"[:4] + event(2)])
async def test_addresses_of_loopback_are_no_change(
    monkeypatch: pytest.MonkeyPatch, socket_pair: tuple[socket.socket, socket.socket], told: bytes
) -> None:
    watching, kernel = socket_pair
    monkeypatch.setattr(addresses, "QUIET_SECONDS", 0.0)
    kernel.send(event(1))
    kernel.send(event(1) + event(1))
    waiting = asyncio.ensure_future(addresses._change(watching))
    async with asyncio.timeout(20):
        for _ in range(100):  # turns of the loop: far more than it takes to read both
            await asyncio.sleep(0)
        assert not waiting.done()
        kernel.send(told)
        await waiting


# The watch of the daemon


class Watched:
    """A watch whose source tells what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[Event] = []
        self.told: asyncio.Queue[OwnAddresses | Exception] = asyncio.Queue()
        self.followed = FollowedAddresses(self._take, ("ipvs",))
        monkeypatch.setattr(addresses, "events", self._events)

    def _take(self, batch: Sequence[Event]) -> None:
        self.taken += batch

    async def _events(self) -> AsyncIterator[list[OwnAddresses]]:
        while True:
            one = await self.told.get()
            if isinstance(one, Exception):
                raise one
            yield [one]


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    made = Watched(monkeypatch)
    yield made
    await made.followed.stop()


async def test_a_mode_that_needs_none_does_not_wait(watched: Watched) -> None:
    async with asyncio.timeout(20):
        await watched.followed.known("nftables")
    assert watched.taken == []


async def test_a_mode_that_needs_them_has_them_when_it_goes_on(watched: Watched) -> None:
    waiting = asyncio.ensure_future(watched.followed.known("ipvs"))
    await asyncio.sleep(0)
    assert not waiting.done()
    watched.told.put_nowait(OwnAddresses(ADDRESSES))
    async with asyncio.timeout(20):
        await waiting
    assert watched.taken == [OwnAddresses(ADDRESSES)]


async def test_a_watch_that_dies_keeps_nobody_waiting_and_begins_anew(watched: Watched) -> None:
    watched.told.put_nowait(ValueError("broken"))
    with pytest.raises(UnknownResult, match="broken"):
        async with asyncio.timeout(20):
            await watched.followed.known("ipvs")
    watched.told.put_nowait(OwnAddresses(ADDRESSES))
    async with asyncio.timeout(20):
        await watched.followed.known("ipvs")
    assert watched.taken == [OwnAddresses(ADDRESSES)]


async def test_a_watch_that_is_stopped_keeps_nobody_waiting(watched: Watched) -> None:
    waiting = asyncio.ensure_future(watched.followed.known("ipvs"))
    await asyncio.sleep(0)
    await watched.followed.stop()
    with pytest.raises(UnknownResult, match="stopped"):
        async with asyncio.timeout(20):
            await waiting
