"""An API server: lists in pages, watches with bookmarks, writes, over HTTP as Kubernetes has it.

Lives here: the protocol, and the faults it can be told to show. Must not: know what vipd does with
any of it. Tests and benches use it where there is no kube-apiserver.
Source: apiserver/pkg/endpoints/handlers/{get,watch}.go, v1.37; KEP-3157 (WatchList).
"""

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from aiohttp import web

from vipd.bench.api_store import Change, Collection, Conflict, Gone, Json, Kept, Store, selector

BOOKMARK_SECONDS = 60.0
MOST_WAITING = 10_000
"""Changes that a watcher may be behind before it is cut off, as the watch cache does."""

Fault = Callable[[web.Request], Awaitable[web.StreamResponse | None]]
"""Asked before every request: what to answer instead, or None."""


class ApiServer:
    """A server for one store. `tokens` None: everyone may ask."""

    def __init__(
        self,
        store: Store,
        *,
        watch_list: bool = True,
        bookmark_seconds: float = BOOKMARK_SECONDS,
        tokens: set[str] | None = None,
    ) -> None:
        self.store = store
        self.watch_list = watch_list
        self.bookmark_seconds = bookmark_seconds
        self.tokens = tokens
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        """Method and path with query of everything that was asked."""
        self._streams: set[asyncio.Task[None] | asyncio.Task[web.StreamResponse]] = set()
        self._runner: web.AppRunner | None = None

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        context: ssl.SSLContext | None = None,
        path: str | None = None,
    ) -> int:
        """Listen, on a Unix socket at `path` too, and return the port."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=context)
        await site.start()
        port = int(self._runner.addresses[0][1])
        if path is not None:
            await web.UnixSite(self._runner, path).start()
        return port

    async def stop(self) -> None:
        """Listen no more, and cut everything off."""
        self.cut()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def cut(self) -> int:
        """Cut off all watches, and return how many there were."""
        streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        return len(streams)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        for fault in tuple(self.faults):
            if (response := await fault(request)) is not None:
                return response
        if self.tokens is not None:
            bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if bearer not in self.tokens:
                return failure(401, "Unauthorized", "Unauthorized")
        path, namespace, name = _parts(request.path)
        collection = self.store.collections.get(path)
        if collection is None:
            if request.method == "GET" and any(
                one.startswith(f"{path}/") for one in self.store.collections
            ):
                told = {"kind": "APIResourceList", "groupVersion": path.removeprefix("/apis/")}
                return web.json_response(told)
            return failure(404, "NotFound", "the server could not find the requested resource")
        if request.method == "GET" and not name:
            if request.query.get("watch") in ("true", "1"):
                return await self._watch(request, collection, namespace)
            return self._list(request, collection, namespace)
        return await _object(request, collection, namespace, name)

    def _list(self, request: web.Request, collection: Collection, namespace: str) -> web.Response:
        meant = _meant(request, namespace)
        version, after = self.store.version, ("", "")
        if token := request.query.get("continue"):
            try:
                version, *rest = json.loads(base64.b64decode(token))
                after = (rest[0], rest[1])
                collection.since(version)
            except Gone:
                return failure(410, "Expired", "The provided continue parameter is too old")
            except (ValueError, IndexError):
                return failure(400, "BadRequest", "continue key is not valid")
        limit = int(request.query.get("limit", "0") or 0)
        texts: list[bytes] = []
        last, more = after, False
        for key, kept in collection.sorted():
            if key <= after or not meant(kept):
                continue
            if limit and len(texts) == limit:
                more = True
                break
            texts.append(kept.text)
            last = key
        metadata: Json = {"resourceVersion": str(version)}
        if more:
            metadata["continue"] = base64.b64encode(json.dumps([version, *last]).encode()).decode()
        head = {
            "kind": f"{collection.kind}List",
            "apiVersion": collection.api_version,
            "metadata": metadata,
        }
        body = json.dumps(head).encode()[:-1] + b',"items":[' + b",".join(texts) + b"]}"
        response = web.Response(body=body, content_type="application/json")
        response.enable_compression()
        return response

    async def _watch(
        self, request: web.Request, collection: Collection, namespace: str
    ) -> web.StreamResponse:
        query = request.query
        initial = query.get("sendInitialEvents") == "true"
        if "resourceVersionMatch" in query and not (initial and self.watch_list):
            return failure(
                422, "Invalid", "resourceVersionMatch: Forbidden: is forbidden for watch"
            )
        meant = _meant(request, namespace)
        version = int(query.get("resourceVersion") or 0)
        if version > self.store.version:
            return failure(504, "Timeout", f"Too large resource version: {version}")
        changes: asyncio.Queue[Change] = asyncio.Queue(MOST_WAITING)
        backlog: list[bytes] = []
        if initial or not version:
            backlog = [_event("ADDED", one) for _, one in collection.sorted() if meant(one)]
            if initial:
                backlog.append(self._bookmark(collection, {"k8s.io/initial-events-end": "true"}))
        else:
            try:
                backlog = [*_told(collection.since(version), meant)]
            except Gone:
                return failure(410, "Expired", f"too old resource version: {version}")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        task = asyncio.current_task()
        assert task is not None

        def changed(change: Change) -> None:
            try:
                changes.put_nowait(change)
            except asyncio.QueueFull:
                task.cancel()

        collection.watchers.add(changed)
        self._streams.add(task)
        try:
            await response.prepare(request)
            if backlog:
                await response.write(b"".join(backlog))
            seconds = float(query.get("timeoutSeconds") or 1800)
            bookmarks = query.get("allowWatchBookmarks") == "true"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    async for texts in self._stream(collection, changes, meant, bookmarks):
                        await response.write(texts)
        except ConnectionError:
            pass  # whoever watched has gone
        except asyncio.CancelledError:
            if request.transport is not None:
                request.transport.abort()
            raise
        finally:
            collection.watchers.discard(changed)
            self._streams.discard(task)
        return response

    async def _stream(
        self,
        collection: Collection,
        changes: "asyncio.Queue[Change]",
        meant: Callable[[Kept], bool],
        bookmarks: bool,
    ) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(self.bookmark_seconds):
                    some = [await changes.get()]
            except TimeoutError:
                if bookmarks:
                    yield self._bookmark(collection, {})
                continue
            while not changes.empty():
                some.append(changes.get_nowait())
            if texts := b"".join(_told(some, meant)):
                yield texts

    def _bookmark(self, collection: Collection, annotations: dict[str, str]) -> bytes:
        metadata: Json = {"resourceVersion": str(self.store.version), "creationTimestamp": None}
        if annotations:
            metadata["annotations"] = annotations
        told = {
            "kind": collection.kind,
            "apiVersion": collection.api_version,
            "metadata": metadata,
        }
        return json.dumps({"type": "BOOKMARK", "object": told}).encode() + b"\n"


def failure(code: int, reason: str, message: str, **headers: str) -> web.Response:
    """Return a Status, as the API says that something failed."""
    told = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }
    return web.json_response(told, status=code, headers=headers)


def _meant(request: web.Request, namespace: str) -> Callable[[Kept], bool]:
    """Return what a list or watch, of one namespace perhaps, selects."""
    fields = request.query.get("fieldSelector", "")
    if namespace:
        fields = f"{fields},metadata.namespace={namespace}"
    return selector(request.query.get("labelSelector", ""), fields)


def _event(kind: str, kept: Kept) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (kind.encode(), kept.text)


def _told(changes: Iterable[Change], meant: Callable[[Kept], bool]) -> list[bytes]:
    """Return the events of a watch: an object that is not meant any more is deleted for it."""
    texts = []
    for change in changes:
        was = change.before is not None and meant(change.before)
        now = change.after is not None and meant(change.after)
        if now and change.after is not None:
            texts.append(_event("MODIFIED" if was else "ADDED", change.after))
        elif was and change.before is not None:
            # The last state, in the version of its end.
            last = json.loads(change.before.text)
            last["metadata"]["resourceVersion"] = str(change.version)
            text = json.dumps(last, separators=(",", ":")).encode()
            texts.append(_event("DELETED", change.before._replace(text=text)))
    return texts


def _parts(path: str) -> tuple[str, str, str]:
    """Return a path without its namespace, the namespace and the name of what it is of."""
    head, found, rest = path.partition("/namespaces/")
    namespace = ""
    if found and "/" in rest:
        namespace, _, rest = rest.partition("/")
        path = f"{head}/{rest}"
    depth = 3 if path.startswith("/api/") else 4
    words = path.strip("/").split("/")
    return "/" + "/".join(words[:depth]), namespace, "/".join(words[depth:])


async def _object(
    request: web.Request, collection: Collection, namespace: str, name: str
) -> web.Response:
    """Create, replace, change, return or delete one object."""
    key = (namespace if collection.namespaced else "", name)
    if request.method in ("POST", "PUT"):
        thing: Json = await request.json()
        thing.setdefault("metadata", {}).setdefault("namespace", namespace)
        if not collection.namespaced:
            del thing["metadata"]["namespace"]
        if not thing["metadata"].get("name") and "generateName" in thing["metadata"]:
            suffix = f"{len(collection.objects):05d}"
            thing["metadata"]["name"] = thing["metadata"]["generateName"] + suffix
        try:
            collection.put(thing, new=request.method == "POST")
        except Conflict:
            return failure(409, "AlreadyExists", f"{thing['metadata']['name']} already exists")
        return web.json_response(thing, status=201 if request.method == "POST" else 200)
    if key not in collection.objects:
        return failure(404, "NotFound", f"{name} not found")
    if request.method == "PATCH":
        return web.json_response(collection.patch(*key, await _merge_patch(request)))
    if request.method == "DELETE":
        collection.delete(*key)
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})
    return web.Response(body=collection.objects[key].text, content_type="application/json")


async def _merge_patch(request: web.Request) -> Json:
    if request.content_type != "application/merge-patch+json":
        raise web.HTTPUnsupportedMediaType
    change: Json = await request.json()
    return change
