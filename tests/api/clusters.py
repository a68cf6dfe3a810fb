"""API servers that the same tests run against: ours, and the real one with etcd.

Each is behind a relay, so that it can be away, or cut off, without its knowing.
"""

import abc
import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator

from aiohttp import ClientSession

from vipd.bench.api_server import ApiServer
from vipd.bench.api_store import Json, Store

PATHS = {
    "Service": "/api/v1/namespaces/{}/services",
    "Event": "/apis/events.k8s.io/v1/namespaces/{}/events",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
    "Node": "/api/v1/nodes",
    "Namespace": "/api/v1/namespaces",
}
GOOD_TOKEN, BAD_TOKEN = "good-token", "expired-token"


class Relay:
    """Passes bytes on between its own port and another one, and can stop doing so."""

    def __init__(self) -> None:
        self.port = 0
        self.to = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Listen no more, and cut off all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> int:
        """Cut off all connections, and return how many there were."""
        count = len(self._open)
        for writer in tuple(self._open):
            writer.transport.abort()
        return count // 2

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.transport.abort()
            return
        if self._server is None:  # stopped meanwhile
            far_writer.transport.abort()
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        for one, other in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.ensure_future(self._pass_on(one, other))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        self._open.discard(writer)
        writer.transport.abort()


class ApiCluster(abc.ABC):
    """An API server to be written to, and how a kubeconfig leads to it."""

    relay: Relay

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """Where it is, by way of the relay."""

    @property
    @abc.abstractmethod
    def authority(self) -> Json:
        """What a kubeconfig says of its certificate."""

    @abc.abstractmethod
    async def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        """Ask something as an administrator, not by way of the relay."""

    @abc.abstractmethod
    async def forget(self) -> None:
        """Forget everything that happened, but not what there is, as after a compaction."""

    async def put(self, thing: Json) -> None:
        """Create or replace an object."""
        thing = copy.deepcopy(thing)
        path = PATHS[thing["kind"]].format(thing["metadata"].get("namespace"))
        there = await self.listed(thing["kind"], thing["metadata"].get("namespace", ""))
        for one in there:
            if one["metadata"]["name"] == thing["metadata"]["name"]:
                thing["metadata"]["resourceVersion"] = one["metadata"]["resourceVersion"]
                await self.ask("PUT", f"{path}/{thing['metadata']['name']}", thing)
                return
        await self.ask("POST", path, thing)

    async def delete(self, kind: str, name: str, namespace: str = "shop") -> None:
        await self.ask("DELETE", f"{PATHS[kind].format(namespace)}/{name}")

    async def listed(self, kind: str, namespace: str = "shop") -> list[Json]:
        found: Json = await self.ask("GET", PATHS[kind].format(namespace))
        items: list[Json] = found.get("items") or []
        return [one for one in items if one["metadata"].get("namespace", "") == namespace]


class Ours(ApiCluster):
    """The server of the bench."""

    def __init__(self, watch_list: bool) -> None:
        self.relay = Relay()
        self._store = Store()
        self.server = ApiServer(self._store, watch_list=watch_list, tokens={GOOD_TOKEN})
        self._session: ClientSession | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.relay.port}"

    @property
    def authority(self) -> Json:
        return {}

    async def start(self) -> None:
        self.relay.to = await self.server.start()
        await self.relay.start()
        self._session = ClientSession(headers={"Authorization": f"Bearer {GOOD_TOKEN}"})

    async def stop(self) -> None:
        assert self._session is not None
        await self._session.close()
        await self.relay.stop()
        await self.server.stop()

    async def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        assert self._session is not None
        url = f"http://127.0.0.1:{self.relay.to}{path}"
        async with self._session.request(method, url, json=body) as response:
            response.raise_for_status()
            found: Json = await response.json()
            return found

    async def forget(self) -> None:
        for collection in self._store.collections.values():
            collection.forget()
        self._store.next()


@contextlib.asynccontextmanager
async def ours(watch_list: bool) -> AsyncIterator[ApiCluster]:
    made = Ours(watch_list)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
