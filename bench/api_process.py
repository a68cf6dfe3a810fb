"""An API server as a process of its own, on a node of the lab: started, and written to.

Lives here: both halves, the process and whoever started it. Nodes reach it over TCP on loopback;
writers over a Unix socket, from whichever network namespace they are in.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vipd.bench.api_server import ApiServer
from vipd.bench.api_store import Json, Store
from vipd.bench.lab import Lab
from vipd.bench.lab_errors import LabError

READY = b"ready\n"
_PATHS = {
    "Service": "/api/v1/namespaces/{}/services",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Node": "/api/v1/nodes",
    "Namespace": "/api/v1/namespaces",
    "ServiceCIDR": "/apis/networking.k8s.io/v1/servicecidrs",
}


class ApiProcess:
    """An API server that runs. `kubeconfig` is the file that leads a daemon on its node to it."""

    def __init__(self, folder: Path) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self.socket = folder / "api.sock"

    def put(self, things: Iterable[Json]) -> float:
        """Create or replace objects, one after the other; return when the last was sent."""
        sent = 0.0
        for thing in things:
            sent = self._ask("PUT", _path(thing), json.dumps(thing).encode())
        return sent

    def delete(self, things: Iterable[Json]) -> float:
        """Delete objects; return when the first was sent."""
        return min(self._ask("DELETE", _path(thing)) for thing in things)

    def get(self, path: str) -> Json:
        """Return what a path says. Raise LabError."""
        found: Json = json.loads(self._asked("GET", path)[1])
        return found

    def _ask(self, method: str, path: str, body: bytes | None = None) -> float:
        return self._asked(method, path, body)[0]

    def _asked(self, method: str, path: str, body: bytes | None = None) -> tuple[float, bytes]:
        """Return when it was sent, and the answer."""
        connection = _UnixConnection(str(self.socket))
        try:
            connection.connect()
            sent = time.monotonic()
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read()
        finally:
            connection.close()
        if response.status >= 300:
            raise LabError(f"API server: {method} {path}: {response.status} {said[:200]!r}")
        return sent, said


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        """Connect to the Unix socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def _path(thing: Json) -> str:
    metadata = thing["metadata"]
    return f"{_PATHS[thing['kind']].format(metadata.get('namespace'))}/{metadata['name']}"


@contextlib.contextmanager
def serving(lab: Lab, node: str, folder: Path, manifests: Path) -> Iterator[ApiProcess]:
    """An API server on a node, with what a List in a file holds."""
    made = ApiProcess(folder)
    process = lab.popen(
        node,
        [
            *(sys.executable, "-P", "-m", "vipd.bench.api_process"),
            *("--kubeconfig", str(made.kubeconfig), "--socket", str(made.socket)),
            *("--load", str(manifests)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        if process.stdout is None or process.stdout.readline() != READY:
            raise LabError(f"the API server ended with status {process.wait()}")
        yield made
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def kubeconfig(server: str, **cluster: Any) -> Json:
    """Return the content of a file that leads to a server which asks for no credentials."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "bench",
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "nobody"}}],
        "clusters": [{"name": "bench", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "nobody", "user": {}}],
    }


async def _serve(store: Store, path: str, ready: Callable[[int], None]) -> None:
    ready(await ApiServer(store).start(path=path))
    await asyncio.Event().wait()


def _main() -> None:
    parser = argparse.ArgumentParser(description="An API server for benches and tests.")
    for option in ("kubeconfig", "socket", "load"):
        parser.add_argument(f"--{option}", required=True)
    told = parser.parse_args()
    store = Store()
    for thing in json.loads(Path(told.load).read_bytes())["items"]:
        store.put(thing)

    def ready(port: int) -> None:
        Path(told.kubeconfig).write_text(json.dumps(kubeconfig(f"http://127.0.0.1:{port}")))
        sys.stdout.buffer.write(READY)
        sys.stdout.flush()

    asyncio.run(_serve(store, told.socket, ready))


if __name__ == "__main__":
    _main()
