"""A cluster whose daemon follows an API server on its node, which a test starts, stops and spoils.

Lives here: the server's thread, and a Cluster that writes to its store. Must not: know what vipd
should do. The folder of manifests is kept as well: it says what is to be expected, and is the way
the store is filled, so that whatever a test says with manifests holds here.
"""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.netns.cluster import Cluster, Manifest

from vipd.bench.api_process import kubeconfig
from vipd.bench.api_server import ApiServer
from vipd.bench.api_store import Store
from vipd.bench.lab import Lab

PORT = 6443
"""In the node's network namespace, so that a server that comes back is found where it was."""
T = TypeVar("T")


class ApiThread:
    """An API server on the lab's node, with an event loop of its own. `store` may be touched
    only by what is given to `do`, while it runs."""

    def __init__(self, lab: Lab) -> None:
        self.store = Store()
        self.server = ApiServer(self.store, bookmark_seconds=1.0)
        self._lab = lab
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen. What the store holds is kept over stops."""
        ready = threading.Event()
        ended = asyncio.Event()

        async def serve() -> None:
            self._loop, self._ended = asyncio.get_running_loop(), ended
            await self.server.start(port=PORT)
            ready.set()
            await ended.wait()
            await self.server.stop()

        self._thread = threading.Thread(
            target=lambda: self._lab.run("node", lambda: asyncio.run(serve()))
        )
        self._thread.start()
        assert ready.wait(20), "the API server does not listen"

    def stop(self) -> None:
        """Cut everything off, and listen no more."""
        if self._thread is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join()
            self._thread = self._loop = None

    def do(self, what: Callable[[], T]) -> T:
        """Return what a function returns that is run where the server runs."""
        if self._loop is None:
            return what()

        async def run() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(20)


class ApiCluster(Cluster):
    """vipd on the lab's node, following an API server there; it is not started yet."""

    def __init__(self, lab: Lab, directory: Path, *flags: str, mode: str = "nftables") -> None:
        self.api = ApiThread(lab)
        super().__init__(lab, directory, *flags, mode=mode)
        leads = directory / "kubeconfig"
        leads.write_text(json.dumps(kubeconfig(f"http://127.0.0.1:{PORT}")))
        words = list(self.daemon.arguments)
        at = words.index("--manifests")
        words[at : at + 2] = ["--kubeconfig", str(leads)]
        self.daemon.arguments = tuple(words)

    def apply(self, *manifests: Manifest) -> tuple[Manifest, ...]:
        """Write them to the store, and to the folder."""
        told = super().apply(*manifests)
        self.api.do(lambda: [self.api.store.put(json.loads(json.dumps(one))) for one in told])
        return told

    def remove(self, *manifests: Manifest) -> None:
        """Delete them from the store, and from the folder."""
        super().remove(*manifests)

        def delete() -> None:
            for one in manifests:
                head = one["metadata"]
                of_kind = self.api.store.of(one["kind"])
                of_kind.delete(head.get("namespace", ""), head["name"])

        self.api.do(delete)

    def problems(self) -> str:
        """What the daemon says is wrong."""
        return " ".join(self.status().problems)
