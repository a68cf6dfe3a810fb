"""Objects of a small cluster, and who follows them as the daemon does."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from vipd.bench.api_store import Json
from vipd.proxy.events import Event, Problem, Synced
from vipd.proxy.names import NamespacedName
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources.kubernetes.resources import Wanted
from vipd.proxy.sources.kubernetes.source import KubernetesSource

DEADLINE_SECONDS = 20.0
FOR_SERVICES = Wanted()


def service(name: str, address: str = "10.96.0.10", **more: object) -> Json:
    ports = [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]
    spec = {"clusterIP": address, "clusterIPs": [address], "ports": ports, **more}
    metadata: Json = {"name": name, "namespace": "shop"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def endpoint_slice(name: str, *addresses: str, of: str = "web") -> Json:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": of},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [one]} for one in addresses],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def name(text: str) -> NamespacedName:
    return NamespacedName(*text.split("/"))


def kubeconfig(path: Path, server: str, user: Json | None = None, **cluster: object) -> str:
    told = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "u", "user": user or {}}],
    }
    path.write_text(yaml.safe_dump(told))
    return str(path)


class Follower:
    """Takes what a source says, as the daemon does."""

    def __init__(self, source: KubernetesSource) -> None:
        self.snapshot = Snapshot()
        self.events: list[Event] = []
        self.problems: dict[str, str] = {}
        self.synced = False
        self._changed = asyncio.Condition()
        self._task = asyncio.ensure_future(self._run(source))

    async def _run(self, source: KubernetesSource) -> None:
        async for events in source.events():
            await self._take(events)

    async def _take(self, events: Sequence[Event]) -> None:
        async with self._changed:
            self.events += events
            self.snapshot, _ = fold(self.snapshot, events)
            for event in events:
                if isinstance(event, Synced):
                    self.synced = True
                elif isinstance(event, Problem):
                    self.problems.pop(event.key, None)
                    if event.error is not None:
                        self.problems[event.key] = str(event.error)
            self._changed.notify_all()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS), self._changed:
            await self._changed.wait_for(lambda: is_so() or self._task.done())
        if self._task.done():
            self._task.result()

    def services(self) -> set[str]:
        """Those of namespace shop."""
        return {str(one) for one in self.snapshot.services if one.namespace == "shop"}

    async def has(self, *services: str) -> None:
        await self.until(lambda: self.services() == set(services))

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def of(self, text: str) -> tuple[str, ...]:
        """The addresses of a service's endpoints."""
        slices = self.snapshot.slices.get(name(text), ())
        return tuple(str(one.address) for each in slices for one in each.endpoints)


async def until(is_so: Callable[[], bool]) -> None:
    """Ask again and again until it is so."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            if is_so():
                return
            await asyncio.sleep(0.02)
