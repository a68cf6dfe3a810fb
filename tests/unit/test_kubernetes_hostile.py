"""An API server that lies, floods or dawdles: bounded, named, and what was known is kept."""

import asyncio
import contextlib
import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from tests.api.follower import endpoint_slice, kubeconfig, name, service
from tests.unit.test_kubernetes_source import Follow, follow, serving, soon, store

from vipd.bench.api_server import ApiServer, failure
from vipd.bench.api_store import Json, Store
from vipd.proxy.events import Deleted
from vipd.proxy.sources.kubernetes import api as api_module
from vipd.proxy.sources.kubernetes import following, known
from vipd.proxy.sources.kubernetes.api import Api, ApiError
from vipd.proxy.sources.kubernetes.credentials import Credentials

__all__ = ["follow", "soon", "store"]
MIB = 1 << 20
SECRET = "s3cr3t-t0ken"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
Raw = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Fault:
    """Answers requests for services in place of the server, until it is taken away."""

    def __init__(self, server: ApiServer, answer: Answer, *, watches: bool | None = None) -> None:
        self._server, self._answer, self._watches = server, answer, watches
        self.met = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse | None:
        watches = request.query.get("watch") == "true"
        if "services" not in request.path or self._watches not in (None, watches):
            return None
        self.met += 1
        return await self._answer(request)

    def __enter__(self) -> "Fault":
        self._server.faults.append(self)
        self._server.cut()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.faults.remove(self)
        self._server.cut()


@contextlib.asynccontextmanager
async def raw_server(answer: Raw) -> AsyncIterator[str]:
    """A server that answers as `answer` writes it."""

    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await reader.readuntil(b"\r\n\r\n")
                await answer(reader, writer)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def asked(tmp_path: Path, server: str, times: int = 1) -> bytes:
    path = kubeconfig(tmp_path / "asking", server, {"token": SECRET})
    api = Api(Credentials(path, lambda: 0.0))
    try:
        for _ in range(times):
            told = await api.get("/api/v1/services", {})
        return told
    finally:
        await api.close()


async def written(request: web.Request, body: bytes, **headers: str) -> web.StreamResponse:
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        await response.write(body)
    return response


def listed(kind: str, *things: Json, more: str = "", version: str = "5000") -> bytes:
    metadata = {"resourceVersion": version, "continue": more}
    return json.dumps({"kind": kind, "metadata": metadata, "items": things}).encode()


# Answers as such


async def test_nobody_else_is_told_who_we_are(tmp_path: Path) -> None:
    told: list[bytes] = []

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.append(b"asked")

    async with raw_server(other) as elsewhere:

        async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {elsewhere}/api/v1/services\r\n"
            writer.write(f"{head}Content-Length: 0\r\n\r\n".encode())
            await writer.drain()

        async with raw_server(redirect) as server:
            with pytest.raises(ApiError, match="307"):
                await asked(tmp_path, server)
    assert told == []


async def test_cookies_are_not_kept(tmp_path: Path) -> None:
    heads: list[str | None] = []

    async def look(request: web.Request) -> web.StreamResponse:
        heads.append(request.headers.get("Cookie"))
        response = web.Response(body=b"{}")
        response.set_cookie("some", "cookie", domain="localhost")
        return response

    async with serving(Store()) as (server, address):
        server.faults.append(look)
        await asked(tmp_path, address.replace("127.0.0.1", "localhost"), times=2)
    assert heads == [None, None]


async def test_headers_without_an_end(tmp_path: Path) -> None:
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(1_000_000):
            line = f"X-{number}: {'x' * 4000}\r\n".encode()
            writer.write(line)
            sent += len(line)
            await writer.drain()

    async with raw_server(endless) as server:
        with pytest.raises(ApiError):
            await asked(tmp_path, server)
    assert sent < 16 * MIB


@pytest.mark.parametrize(
    ("head", "limit"),
    [(b"HTTP/1.1 200 OK\r\nX-Slow: ", "ANSWER_SECONDS"),
     (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", "WHOLE_SECONDS")],
    ids=["head", "body"],
)  # fmt: skip
async def test_an_answer_that_comes_byte_by_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes, limit: str
) -> None:
    monkeypatch.setattr(api_module, limit, 0.3)

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with raw_server(slow) as server:
        with pytest.raises(ApiError, match="no answer in time"):
            await asked(tmp_path, server)


async def test_a_wait_that_no_number_holds(tmp_path: Path) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        told = b'{"kind":"Status","code":429,"details":{"retryAfterSeconds":1%s}}' % (b"0" * 400)
        return web.Response(status=429, body=told)

    async with serving(Store()) as (server, address):
        server.faults.append(refuse)
        with pytest.raises(ApiError, match="429"):
            await asked(tmp_path, address)


async def test_what_a_server_says_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return failure(500, "Odd", "\x1b]0;owned\x07 and\nmore")

    async with serving(Store()) as (server, address):
        server.faults.append(refuse)
        with pytest.raises(ApiError) as raised:
            await asked(tmp_path, address)
    assert str(raised.value).isprintable()
    assert "owned" in str(raised.value)


# Lists


@pytest.fixture(params=[True, False], ids=["watch-list", "pages"])
async def api(request: pytest.FixtureRequest, store: Store) -> AsyncIterator[ApiServer]:
    async with serving(store, watch_list=request.param) as (server, _):
        yield server


@pytest.fixture
async def pages(store: Store) -> AsyncIterator[ApiServer]:
    async with serving(store, watch_list=False) as (server, _):
        yield server


def url(server: ApiServer) -> str:
    assert server._runner is not None
    return "http://{}:{}".format(*server._runner.addresses[0][:2])


async def test_a_bomb_is_not_let_off(
    pages: ApiServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "MAX_PAGE_BYTES", MIB)
    monkeypatch.setattr(following, "MAX_LINE_BYTES", MIB)
    bomb = gzip.compress(b" " * (128 * MIB), 6)
    follower = await follow(url(pages))
    await follower.until(lambda: follower.synced)

    async def explode(request: web.Request) -> web.StreamResponse:
        return await written(request, bomb, **{"Content-Encoding": "gzip"})

    tracemalloc.start()
    try:
        with Fault(pages, explode) as fault:
            pages.store.put(service("more", "10.96.0.11"))
            await follower.until(
                lambda: any("larger than" in x for x in follower.problems.values())
            )
        assert fault.met >= 2
        assert tracemalloc.get_traced_memory()[1] < 24 * MIB
    finally:
        tracemalloc.stop()
    await follower.has("shop/web", "shop/more")
    await follower.until(lambda: not follower.problems)
    assert not any(isinstance(one, Deleted) for one in follower.events)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (listed("NodeList"), "NodeList"),
        (b'{"metadata":{"resourceVersion":"5000"}}', "nothing"),
        (b'{"kind":"Status","status":"Success"}', "Status"),
        (listed("ServiceList", version=""), "no resource version"),
        (b'{"kind":"ServiceList","metadata":{"resourceVersion":"7"},"items":{}}', "is not a list"),
        (b"", "is not a list"),
    ],
)
async def test_what_is_no_list_of_that_kind_deletes_nothing(
    pages: ApiServer, follow: Follow, body: bytes, says: str
) -> None:
    follower = await follow(url(pages))
    await follower.until(lambda: follower.synced)

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") == "true":
            return failure(410, "Expired", "too old")
        return await written(request, body)

    with Fault(pages, answer):
        await follower.until(lambda: any(says in one for one in follower.problems.values()))
    pages.store.put(service("more", "10.96.0.11"))
    await follower.has("shop/web", "shop/more")
    await follower.until(lambda: not follower.problems)
    assert not any(isinstance(one, Deleted) for one in follower.events)


async def test_a_list_without_an_end(
    pages: ApiServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = await follow(url(pages))
    await follower.until(lambda: follower.synced)
    monkeypatch.setattr(following, "LIST_SECONDS", 0.3)

    async def another_page(request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") == "true":
            return failure(410, "Expired", "too old")
        return await written(request, listed("ServiceList", more="next"))

    with Fault(pages, another_page):
        await follower.until(lambda: any("not complete" in x for x in follower.problems.values()))
        assert "shop/web" in {str(one) for one in follower.snapshot.services}
    await follower.until(lambda: not follower.problems)
    await follower.has("shop/web")


async def test_more_objects_than_any_cluster_has(
    api: ApiServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "MOST_OBJECTS", 5)
    for number in range(9):
        api.store.put(service(f"many-{number}", f"10.96.1.{number}"))
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    assert len(follower.snapshot.services) == 5
    assert [one for one in follower.problems.values() if "more than 5" in one]
    api.store.put(service("many-0", "10.96.2.1"))  # those that are known are followed
    await follower.until(
        lambda: str(follower.snapshot.services[name("shop/many-0")].cluster_ips[0]) == "10.96.2.1"
    )


async def test_only_so_many_malformed_objects_are_named(
    api: ApiServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "MOST_MALFORMED", 2)
    for number in range(9):
        api.store.put(service(f"bad-{number}", "no address"))
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    assert len(follower.problems) == 3
    assert [one for one in follower.problems.values() if "more than 2 are malformed" in one]
    assert set(follower.snapshot.services) == {name("shop/web")}
    for number in range(9):
        api.store.put(service(f"bad-{number}", f"10.96.1.{number}"))
    for collection in api.store.collections.values():
        collection.forget()
    api.store.next()
    api.cut()
    await follower.until(lambda: not follower.problems)
    assert len(follower.snapshot.services) == 10


# Watches


async def test_a_line_that_never_ends_is_silence(
    api: ApiServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    monkeypatch.setattr(following, "SILENCE_SECONDS", 0.3)
    left = 1

    async def drip(request: web.Request) -> web.StreamResponse | None:
        nonlocal left
        if "services" not in request.path or not left:
            return None
        left -= 1
        response = await written(request, b"{")
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.01)
        return response

    api.faults.append(drip)
    api.cut()
    api.store.put(service("more", "10.96.0.11"))
    await follower.has("shop/web", "shop/more")


async def test_a_store_that_was_put_back_has_other_things_in_the_same_versions(
    api: ApiServer, follow: Follow
) -> None:
    """As after `etcdctl snapshot restore`: versions begin again where the backup was made."""
    old = api.store.version
    api.store.put(service("web", "10.96.0.20"))
    api.store.put(service("gone", "10.96.0.21"))
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    api.store.of("Service").delete("shop", "gone")
    await follower.has("shop/web")
    for collection in api.store.collections.values():
        collection.forget()
        collection._forgotten = 0
    api.store.version = old
    api.store.of("Service").objects.clear()
    version = api.store.put(service("web", "10.96.0.30"))  # of the version that .20 was
    assert version == old + 1
    api.cut()
    await follower.until(
        lambda: str(follower.snapshot.services[name("shop/web")].cluster_ips[0]) == "10.96.0.30"
    )


TWICE = (
    b'{"kind":"Service","metadata":{"name":"nobody"},"metadata":{"name":"twice",'
    b'"namespace":"shop","resourceVersion":"%d"},"spec":{"clusterIP":"10.96.0.8"},"spec":{"clusterIP":"10.96.0.9",'
    b'"clusterIPs":["10.96.0.9"],"ports":[{"port":80}]}}'
)


async def test_of_a_key_twice_the_last_counts(api: ApiServer, follow: Follow) -> None:
    """As encoding/json has it, which wrote it."""
    version = api.store.next()
    api.store.of("Service").put_text(("shop", "twice"), TWICE % version, {}, {}, version)
    follower = await follow(url(api))
    await follower.has("shop/web", "shop/twice")
    assert follower.problems == {}


async def test_addresses_of_the_wrong_family_are_named(api: ApiServer, follow: Follow) -> None:
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    api.store.put(endpoint_slice("web-1", "fd00::1"))
    await follower.until(lambda: bool(follower.problems))
    assert "addresses" in "".join(follower.problems.values())
    assert follower.of("shop/web") == ("10.244.1.10", "10.244.2.10")


async def test_an_outage_says_since_when(store: Store, follow: Follow) -> None:
    server = ApiServer(store)
    follower = await follow(f"http://127.0.0.1:{await server.start()}")
    await follower.until(lambda: follower.synced)
    await server.stop()
    await follower.until(lambda: bool(follower.problems))
    (text, *_) = follower.problems.values()
    assert "nothing heard since 20" in text
    assert text.count("UTC") == 1


async def test_a_right_that_is_taken_and_given_back(store: Store, follow: Follow) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse | None:
        if "servicecidrs" not in request.path:
            return None
        return failure(403, "Forbidden", "no longer")

    async with serving(store) as (server, address):
        follower = await follow(address)
        await follower.until(lambda: follower.synced)
        server.faults.append(refuse)
        server.cut()
        await follower.until(lambda: "no longer" in str(follower.problems))
        server.faults.clear()
        cidr = {"kind": "ServiceCIDR", "metadata": {"name": "more"}, "spec": {"cidrs": []}}
        server.store.put(cidr)
        await follower.until(lambda: "more" in follower.snapshot.service_cidrs)
