"""The API server as a source, against a server of HTTP: what is asked, told, kept and named."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from tests.api.follower import FOR_SERVICES, Follower, endpoint_slice, kubeconfig, name, service

from vipd.bench.api_server import ApiServer, failure
from vipd.bench.api_store import Store
from vipd.proxy.events import Deleted, Problem
from vipd.proxy.sources.kubernetes import following, pace
from vipd.proxy.sources.kubernetes.resources import Wanted
from vipd.proxy.sources.kubernetes.source import KubernetesSource


@contextlib.asynccontextmanager
async def serving(store: Store, **more: object) -> AsyncIterator[tuple[ApiServer, str]]:
    server = ApiServer(store, **more)  # type: ignore[arg-type]
    port = await server.start()
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        await server.stop()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long after failures."""
    monkeypatch.setattr(pace, "LONGEST_SECONDS", 0.2)
    monkeypatch.setattr(pace, "FIRST_SECONDS", 0.02)


@pytest.fixture
def store() -> Store:
    made = Store()
    made.put(service("web"))
    made.put(endpoint_slice("web-1", "10.244.1.10", "10.244.2.10"))
    made.put({"kind": "Node", "metadata": {"name": "node-1"}})
    made.put({"kind": "Node", "metadata": {"name": "node-2"}})
    return made


@pytest.fixture(params=[True, False], ids=["watch-list", "pages"])
async def api(request: pytest.FixtureRequest, store: Store) -> AsyncIterator[ApiServer]:
    async with serving(store, watch_list=request.param) as (server, _):
        yield server


@pytest.fixture
async def follow(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Follower]]]:
    followers: list[Follower] = []

    async def begin(server: str, wanted: Wanted = FOR_SERVICES) -> Follower:
        path = kubeconfig(tmp_path / "kubeconfig", server)
        followers.append(Follower(KubernetesSource(path, "node-1", wanted)))
        return followers[-1]

    yield begin
    for one in followers:
        await one.stop()


Follow = Callable[..., Awaitable[Follower]]


def url(api: ApiServer) -> str:
    assert api._runner is not None
    host, port = api._runner.addresses[0][:2]
    return f"http://{host}:{port}"


async def test_how_long_nothing_was_heard(tmp_path: Path, store: Store) -> None:
    async with serving(store) as (_, address):
        path = kubeconfig(tmp_path / "kubeconfig", address)
        source = KubernetesSource(path, "node-1", FOR_SERVICES)
        assert source.silence() == {}
        follower = Follower(source)
        await follower.until(lambda: follower.synced)
        await follower.stop()
    kinds = {"Service", "EndpointSlice", "Node", "ServiceCIDR"}
    assert source.silence().keys() <= kinds
    assert {"Service", "EndpointSlice", "Node"} <= source.silence().keys()
    then = source.silence()["Service"]
    assert then >= 0
    assert source.silence()["Service"] > then


async def test_a_cut_watch_goes_on_where_it_was(api: ApiServer, follow: Follow) -> None:
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    asked = len(api.requests)
    api.cut()
    api.store.put(service("more", "10.96.0.11"))
    await follower.has("shop/web", "shop/more")
    assert all("watch=true" in path for _, path in api.requests[asked:])
    assert not any("sendInitialEvents" in path for _, path in api.requests[asked:])
    assert not any(isinstance(one, Deleted) for one in follower.events)


async def test_an_error_in_a_watch_lists_again(api: ApiServer, follow: Follow) -> None:
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    told = False

    async def fault(request: web.Request) -> web.StreamResponse | None:
        nonlocal told
        if told or "services" not in request.path or request.query.get("watch") != "true":
            return None
        told = True
        response = web.StreamResponse()
        await response.prepare(request)
        status = b'{"kind":"Status","code":410,"reason":"Expired","message":"too old"}'
        await response.write(b'{"type":"ERROR","object":%s}\n' % status)
        return response

    api.faults.append(fault)
    api.store.of("Service").objects.pop(("shop", "web"))  # nobody was told
    api.cut()
    await follower.has()


GARBAGE = [
    b"garbage\n",
    b'{"type":"ADDED"}\n',
    b'{"type":"EXPLODED","object":{"metadata":{}}}\n',
    b'{"type":"MODIFIED","object":[]}\n',
    b"\xff\xfe\x00\n",
    b'{"type":"ADDED","object":' + b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: line[:24].decode("latin1"))
async def test_garbage_in_a_watch_loses_nothing(
    api: ApiServer, follow: Follow, line: bytes
) -> None:
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    left = 3

    async def fault(request: web.Request) -> web.StreamResponse | None:
        nonlocal left
        if request.query.get("watch") != "true" or not left:
            return None
        left -= 1
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(line)
        return response

    api.faults.append(fault)
    api.cut()
    api.store.put(service("more", "10.96.0.11"))
    await follower.has("shop/web", "shop/more")
    assert not any(isinstance(one, Deleted) for one in follower.events)


async def test_a_line_without_an_end_is_bounded(
    api: ApiServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "MAX_LINE_BYTES", 1 << 20)
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    left, sent = 1, 0

    async def fault(request: web.Request) -> web.StreamResponse | None:
        nonlocal left, sent
        if "services" not in request.path or not left:
            return None
        left -= 1
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 65536)
                sent += 65536
        return response

    api.faults.append(fault)
    api.cut()
    api.store.put(service("more", "10.96.0.11"))
    await follower.has("shop/web", "shop/more")
    assert sent < 64 << 20


async def test_a_malformed_object_is_named_and_keeps_its_last_form(
    api: ApiServer, follow: Follow
) -> None:
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    broken = service("web")
    broken["spec"]["ports"][0]["port"] = 70000
    api.store.put(broken)
    api.store.put(service("more", "10.96.0.11"))
    await follower.has("shop/web", "shop/more")
    assert [one for one in follower.problems.values() if "shop/web" in one and "port" in one]
    assert follower.snapshot.services[name("shop/web")].ports[0].port == 80
    api.store.put(service("web", "10.96.0.13"))
    await follower.until(lambda: not follower.problems)
    api.store.put(broken)
    await follower.until(lambda: bool(follower.problems))
    api.store.of("Service").delete("shop", "web")
    await follower.has("shop/more")
    assert follower.problems == {}


async def test_what_is_left_out_of_an_object_is_named_and_the_rest_served(
    api: ApiServer, follow: Follow
) -> None:
    api.store.put(service("web", externalIPs=["203.0.113.1", "203.0.113"]))
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    (told,) = follower.problems.values()
    assert "Service shop/web: spec.externalIPs[1]" in told
    assert len(follower.snapshot.services[name("shop/web")].external_ips) == 1
    api.store.put(service("web"))
    await follower.until(lambda: not follower.problems)


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        (b'{"kind":"Secret","metadata":{"name":"x","namespace":"shop"}}', "kind"),
        (b'{"kind":"Service","metadata":{}}', "metadata.name"),
        (b'{"kind":"Service","metadata":{"name":"x"}}', "metadata.namespace"),
        (b'{"kind":"Service","metadata":{"name":"../x","namespace":"shop"}}', "metadata.name"),
        (b'{"kind":"Service"}', "metadata"),
        (b'"text"', "object"),
    ],
)
async def test_an_object_without_a_name_is_told_of_once_and_the_rest_is_read(
    api: ApiServer, follow: Follow, thing: bytes, says: str
) -> None:
    collection = api.store.of("Service")
    collection.put_text(("shop", "bad"), thing, {}, {}, api.store.next())
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    await follower.until(lambda: bool(follower.problems))
    assert says in "".join(follower.problems.values())
    assert follower.of("shop/web")
    collection.objects.pop(("shop", "bad"))
    for each in api.store.collections.values():
        each.forget()
    api.store.next()
    api.cut()


@pytest.mark.parametrize("code", [500, 502, 429, 503])
async def test_a_server_in_trouble_is_asked_again(store: Store, follow: Follow, code: int) -> None:
    left = 6

    async def fault(request: web.Request) -> web.StreamResponse | None:
        nonlocal left
        left -= 1
        if left < 0:
            return None
        headers = {"Retry-After": "0"} if code == 429 else {}
        return failure(code, "Trouble", "not now", **headers)

    async with serving(store) as (server, address):
        server.faults.append(fault)
        follower = await follow(address)
        await follower.until(lambda: follower.synced)
        await follower.until(lambda: not follower.problems)
        assert any(
            isinstance(one, Problem) and f"{code} not now" in str(one.error)
            for one in follower.events
        )


async def test_a_kind_that_is_not_needed_may_be_absent_or_forbidden(
    store: Store, follow: Follow
) -> None:
    del store.collections["/apis/networking.k8s.io/v1/servicecidrs"]

    async def fault(request: web.Request) -> web.StreamResponse | None:
        if "namespaces" not in request.path:
            return None
        return failure(403, "Forbidden", 'namespaces is forbidden: User "x" cannot list')

    async with serving(store) as (server, address):
        server.faults.append(fault)
        follower = await follow(address, Wanted(names=True))
        await follower.until(lambda: follower.synced)
        (told,) = follower.problems.values()
        assert "namespaces" in told
        assert "cannot list" in told


async def test_a_version_that_goes_back_lists_again(api: ApiServer, follow: Follow) -> None:
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    api.store.of("Service").objects.pop(("shop", "web"))
    version = api.store.version
    old = b'{"kind":"Service","metadata":{"name":"old","namespace":"shop","resourceVersion":"3"}}'
    api.store.of("Service").put_text(("shop", "old"), old, {}, {}, version + 1)
    del api.store.of("Service").objects["shop", "old"]
    await follower.has()


async def test_a_silent_watch_is_replaced(
    api: ApiServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "SILENCE_SECONDS", 0.3)
    follower = await follow(url(api))
    await follower.until(lambda: follower.synced)
    silent: list[str] = []

    async def fault(request: web.Request) -> web.StreamResponse | None:
        if "services" not in request.path or len(silent) == 2:
            return None
        silent.append(request.path)
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    api.faults.append(fault)
    api.cut()
    api.store.put(service("more", "10.96.0.11"))
    await follower.has("shop/web", "shop/more")
    assert len(silent) == 2
