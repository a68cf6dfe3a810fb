"""The HTTP server against strangers: slow ones, loud ones, and many of them."""

import asyncio
import contextlib
import logging
import socket

import pytest
from tests.unit.http_asking import World, running, send
from tests.waiting import until

from vipd.proxy.http import crowd
from vipd.proxy.http import server as server_module
from vipd.proxy.http.answer import Answer
from vipd.proxy.http.crowd import Crowd
from vipd.proxy.http.listeners import Listener, Place
from vipd.proxy.http.shared import Shared
from vipd.proxy.names import parse_address
from vipd.proxy.settings import HttpSettings


async def hello() -> Answer:
    return Answer(b"hello", "text/plain; charset=utf-8")


async def broken() -> Answer:
    raise RuntimeError("a bug")


PAGES = {"/hello": hello, "/broken": broken}


class TestRequests:
    async def test_headers_of_every_answer(self) -> None:
        async with running(World(pages=PAGES)) as world:
            address, port = world.http.places["metrics"]
            answers = [
                await world.ask("/hello", server="metrics"),
                await world.ask("/nowhere", server="metrics"),
                await world.ask("/broken", server="metrics"),
                await send(str(address), port, b"garbage\r\n\r\n"),
            ]
            assert [one.status for one in answers] == [200, 404, 500, 400]
            assert answers[0].headers["connection"] == "close"
            for one in answers:
                assert "server" not in one.headers
                assert one.headers["x-content-type-options"] == "nosniff"

    async def test_only_reading(self) -> None:
        async with running(World(pages=PAGES)) as world:
            told = await world.ask("/hello", "HEAD", "metrics")
            assert (told.status, told.body, told.headers["content-length"]) == (200, b"", "5")
            for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
                told = await world.ask("/hello", method, "metrics")
                assert (told.status, told.headers["allow"]) == (405, "GET, HEAD")

    async def test_a_query_changes_nothing(self) -> None:
        async with running(World()) as world:
            assert (await world.ask("/healthz?verbose=1")).status == 200
            assert (await world.ask("/healthz/")).status == 404
            assert (await world.ask("/")).status == 404

    async def test_a_broken_page_is_logged_once_and_says_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logged: list[str] = []
        monkeypatch.setattr(
            server_module.log,
            "error",
            lambda event, **what: logged.append(what["path"]),
            raising=False,
        )
        async with running(World(pages=PAGES)) as world:
            for _ in range(3):
                told = await world.ask("/broken", server="metrics")
                assert b"a bug" not in told.body
        assert logged == ["/broken"]

    async def test_strangers_write_no_log(
        self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with caplog.at_level(logging.DEBUG):
            async with running(World()) as world:
                address, port = world.http.places["healthz"]
                for request in (b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n"):
                    assert (await send(str(address), port, request)).status == 400
        assert [one for one in caplog.records if one.name != "asyncio"] == []
        assert capfd.readouterr().err == ""


class TestStrangers:
    @pytest.mark.parametrize(
        "request_",
        [
            b"GET /hello HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n",
            b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        ],
        ids=["header", "path"],
    )
    async def test_a_long_line_is_refused(self, request_: bytes) -> None:
        async with running(World(pages=PAGES)) as world:
            address, port = world.http.places["metrics"]
            assert (await send(str(address), port, request_)).status == 400

    async def test_headers_without_end_are_cut(self) -> None:
        async with running(World()) as world:
            address, port = world.http.places["healthz"]
            incoming, outgoing = await asyncio.open_connection(str(address), port)
            outgoing.write(b"GET /healthz HTTP/1.1\r\n")
            sent = 0
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(20):
                    while not incoming.at_eof():
                        outgoing.write(b"X-A: " + b"a" * 1000 + b"\r\n")
                        sent += 1000
                        await outgoing.drain()
                        await asyncio.sleep(0)
            assert sent < 64 * crowd.MOST_BYTES, "what the kernel buffers, not more"
            outgoing.close()

    async def test_who_sends_slowly_is_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with listening(Crowd(seconds=0.05)) as port:
            incoming, outgoing = await asyncio.open_connection("127.0.0.1", port)
            outgoing.write(b"GET /hello HT")
            async with asyncio.timeout(20):
                with contextlib.suppress(ConnectionError):
                    assert await incoming.read() == b""
            outgoing.close()

    async def test_who_reads_slowly_is_cut(self) -> None:
        async def much() -> Answer:
            return Answer(b"x" * (32 << 20))

        one = Crowd(seconds=0.2)
        async with listening(one, much):
            pass
        async with listening(one, much) as port:
            reading = socket.socket()
            reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reading.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(reading, ("127.0.0.1", port))
            await loop.sock_sendall(reading, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
            await until(lambda: len(one) == 1)
            await until(lambda: len(one) == 0)
            reading.close()

    async def test_of_too_many_the_oldest_goes(self) -> None:
        one = Crowd(most=8)
        async with listening(one) as port:
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
            await until(lambda: len(one) == 8)
            told = await send("127.0.0.1", port, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (told.status, told.body) == (200, b"hello")
            await until(lambda: len(one) <= 8)
            for incoming, outgoing in idle[:40]:
                async with asyncio.timeout(20):
                    with contextlib.suppress(ConnectionError):
                        assert await incoming.read() == b""
                outgoing.close()
            for _, outgoing in idle[40:]:
                outgoing.close()

    async def test_many_requests_at_once_are_all_answered(self) -> None:
        async with running(World()) as world:
            told = await asyncio.gather(*(world.ask("/livez") for _ in range(100)))
        assert {one.status for one in told} == {200}


class TestShared:
    async def test_who_asks_meanwhile_gets_the_same(self) -> None:
        made = 0
        go = asyncio.Event()

        async def make() -> int:
            nonlocal made
            made += 1
            await go.wait()
            return made

        shared = Shared(make, 0.0)
        asking = [asyncio.ensure_future(shared.get()) for _ in range(5)]
        await until(lambda: made == 1)
        asking[0].cancel()  # one that goes takes nothing from the others
        go.set()
        assert await asyncio.gather(*asking[1:]) == [1, 1, 1, 1]
        assert await shared.get() == 2

    async def test_it_is_kept_but_a_failure_is_not(self) -> None:
        answers: list[int | Exception] = [RuntimeError("once"), 1, 2]

        async def make() -> int:
            one = answers.pop(0)
            if isinstance(one, Exception):
                raise one
            return one

        shared = Shared(make, 60.0)
        with pytest.raises(RuntimeError):
            await shared.get()
        assert [await shared.get(), await shared.get()] == [1, 1]


@contextlib.asynccontextmanager
async def listening(one: Crowd, page=hello):  # type: ignore[no-untyped-def]
    """Serve a page for whatever is asked, with a crowd of the test's; yield the port."""

    async def respond(method: str, path: str) -> Answer:
        return await page()  # type: ignore[no-any-return]

    listener = Listener("test", Place(parse_address("127.0.0.1"), 0), respond, one)
    assert listener.open()
    await listener.serve()
    try:
        yield listener.port
    finally:
        listener.close()
        one.cut_all()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_any_address_is_of_both_families() -> None:
    world = World(HttpSettings(healthz=(parse_address("0.0.0.0"), 0)))
    async with running(world):
        _, port = world.http.places["healthz"]
        for address in ("127.0.0.1", "::1"):
            assert (await send(address, port, b"GET /livez HTTP/1.0\r\n\r\n")).status == 200
