"""A real kube-apiserver with etcd, on loopback, for as long as a test session.

Their binaries are looked for in $KUBEBUILDER_ASSETS and on PATH, as controller-runtime's envtest
does; flags are the fewest that make both run.
"""

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError

import trustme
from aiohttp import ClientSession
from tests.api.clusters import GOOD_TOKEN, ApiCluster, Relay

from vipd.bench.api_store import Json

ADMINISTRATOR = "administrator-token"
START_SECONDS = 120.0
NODE_USER = "system:serviceaccount:kube-system:vipd"


def missing() -> str:
    """Why there is no real API server to test against; empty where there is."""
    lacking = [name for name in ("etcd", "kube-apiserver") if _binary(name) is None]
    if not lacking:
        return ""
    return f"no {' and no '.join(lacking)} in $KUBEBUILDER_ASSETS or on PATH"


def _binary(name: str) -> str | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS", "")
    return (shutil.which(name, path=assets) if assets else None) or shutil.which(name)


class KubeApiserver:
    """Both processes. The API server can be started again; etcd keeps what there is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.authority = trustme.CA()
        self.port = 0
        self._etcd_url = ""
        self._etcd: subprocess.Popen[bytes] | None = None
        self._apiserver: subprocess.Popen[bytes] | None = None
        self._context = ssl.create_default_context(cadata=self.authority.cert_pem.bytes().decode())
        self._context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        self._write_files()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def context(self) -> ssl.SSLContext:
        return self._context

    def start(self) -> None:
        client, peer = free_port(), free_port()
        self._etcd_url = f"http://127.0.0.1:{client}"
        self._etcd = self._run(
            *("etcd", f"--data-dir={self._folder}/etcd", "--unsafe-no-fsync"),
            *(
                f"--listen-client-urls={self._etcd_url}",
                f"--advertise-client-urls={self._etcd_url}",
            ),
            *(f"--listen-peer-urls=http://127.0.0.1:{peer}",),
        )
        self.start_apiserver()

    def start_apiserver(self) -> None:
        """Start the API server, on another port each time, and wait until it is ready."""
        self.port = free_port()
        self._apiserver = self._run(
            "kube-apiserver",
            f"--etcd-servers={self._etcd_url}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=RBAC",
            f"--tls-cert-file={self._folder}/server.pem",
            f"--tls-private-key-file={self._folder}/server.key",
            f"--token-auth-file={self._folder}/tokens.csv",
            f"--service-account-key-file={self._folder}/server.key",
            f"--service-account-signing-key-file={self._folder}/server.key",
            "--service-account-issuer=https://vipd.test",
            f"--cert-dir={self._folder}/certificates",
            "--etcd-compaction-interval=0",
            "--disable-admission-plugins=ServiceAccount",
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._apiserver.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"kube-apiserver: {self._log('kube-apiserver')}")
            with contextlib.suppress(URLError, OSError, HTTPError):
                self.ask("GET", "/readyz?verbose", raw=True)
                return
            time.sleep(0.1)

    def stop_apiserver(self) -> None:
        if self._apiserver is not None:
            self._apiserver.kill()
            self._apiserver.wait()

    def stop(self) -> None:
        self.stop_apiserver()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()

    def forget(self) -> None:
        """Compact etcd, and start the API server anew: its cache remembers, too."""
        self.stop_apiserver()
        found = self._etcd_ask("/v3/kv/range", {"key": "AA==", "range_end": "AA==", "limit": 1})
        revision = found["header"]["revision"]
        self._etcd_ask("/v3/kv/compaction", {"revision": revision, "physical": True})
        self.start_apiserver()

    def ask(self, method: str, path: str, body: Json | None = None, *, raw: bool = False) -> Json:
        headers = {
            "Authorization": f"Bearer {ADMINISTRATOR}",
            "Content-Type": "application/json",
        }
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, context=self._context, timeout=30) as response:
            text = response.read()
        return {} if raw else dict(json.loads(text))

    def allow(self) -> None:
        """Give the daemon's user what kube-proxy's role has (system:node-proxier)."""
        reads = ["services", "nodes", "namespaces", "endpointslices", "servicecidrs"]
        rules = [
            {"apiGroups": ["*"], "resources": reads, "verbs": ["list", "watch"]},
            {
                "apiGroups": ["", "events.k8s.io"],
                "resources": ["events"],
                "verbs": ["create", "patch"],
            },
        ]
        root = "/apis/rbac.authorization.k8s.io/v1"
        kind = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "vipd"}}
        self.ask("POST", f"{root}/clusterroles", {**kind, "kind": "ClusterRole", "rules": rules})
        bound = {
            **kind,
            "kind": "ClusterRoleBinding",
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "vipd",
            },
            "subjects": [{"kind": "User", "name": "vipd", "apiGroup": "rbac.authorization.k8s.io"}],
        }
        self.ask("POST", f"{root}/clusterrolebindings", bound)

    def _etcd_ask(self, path: str, body: Json) -> Json:
        request = urllib.request.Request(f"{self._etcd_url}{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as response:
            return dict(json.loads(response.read()))

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        binary = _binary(name)
        assert binary is not None
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [binary, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def _write_files(self) -> None:
        mine = self.authority.issue_cert("127.0.0.1", "localhost")
        (self._folder / "server.pem").write_bytes(mine.cert_chain_pems[0].bytes())
        key = self._folder / "server.key"
        key.touch(mode=0o600)
        key.write_bytes(mine.private_key_pem.bytes())
        lines = (
            f"{ADMINISTRATOR},administrator,1,system:masters",
            f"{GOOD_TOKEN},vipd,2,",
        )
        (self._folder / "tokens.csv").write_text("\n".join(lines) + "\n")


class Real(ApiCluster):
    """The real servers, as a cluster of the tests."""

    def __init__(self, servers: KubeApiserver) -> None:
        self.relay = Relay()
        self._servers = servers
        self._session: ClientSession | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.relay.port}"

    @property
    def authority(self) -> Json:
        import base64

        pem = self._servers.authority.cert_pem.bytes()
        return {"certificate-authority-data": base64.b64encode(pem).decode()}

    async def start(self) -> None:
        self.relay.to = self._servers.port
        await self.relay.start()
        self._session = ClientSession(headers={"Authorization": f"Bearer {ADMINISTRATOR}"})
        for kind in ("Service", "EndpointSlice"):
            for one in await self.listed(kind):
                await self.delete(kind, one["metadata"]["name"])

    async def stop(self) -> None:
        assert self._session is not None
        await self._session.close()
        await self.relay.stop()

    async def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        assert self._session is not None
        url, context = f"{self._servers.url}{path}", self._servers.context
        async with self._session.request(method, url, json=body, ssl=context) as response:
            if response.status >= 300:
                raise RuntimeError(f"{method} {path}: {response.status} {await response.text()}")
            found: Json = await response.json()
            return found

    async def forget(self) -> None:
        import asyncio

        await asyncio.to_thread(self._servers.forget)
        self.relay.to = self._servers.port


@contextlib.contextmanager
def running(folder: Path) -> Iterator[KubeApiserver]:
    """Both servers, with what the tests need in them."""
    made = KubeApiserver(folder)
    try:
        made.start()
        made.allow()
        for name in ("shop",):
            space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            made.ask("POST", "/api/v1/namespaces", space)
        for name in ("node-1", "node-2"):
            node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
            made.ask("POST", "/api/v1/nodes", node)
        yield made
    finally:
        made.stop()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
