"""Whatever goes wrong with credentials: they stand in no log, no error and no status."""

import asyncio
import base64
import contextlib
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme
import yaml
from aiohttp import web
from tests.api.follower import DEADLINE_SECONDS, kubeconfig
from tests.unit.test_kubernetes_source import soon
from tests.waiting import until

from vipd.bench.api_server import ApiServer, failure
from vipd.bench.api_store import Json, Store
from vipd.proxy.errors import VipdError
from vipd.proxy.settings import NodeSettings
from vipd.proxy.sources.kubernetes.resources import Wanted
from vipd.proxy.sources.kubernetes.source import KubernetesSource
from vipd.proxy.sync import Sync

__all__ = ["soon"]
SECRET = "s3cr3t/t0ken+"
ENCODED = base64.b64encode(SECRET.encode()).decode()
PASSWORD = quote(SECRET, safe="")
FORMS = (SECRET, ENCODED, PASSWORD, base64.b64encode(f"me:{SECRET}".encode()).decode())
"""The secret as it is, and as it stands in headers, URLs and files."""


async def what_is_said(path: Path) -> str:
    """Follow an API server until something fails; return everything that is told of it."""
    sync = Sync(NodeSettings(node_name="node-1"))
    source = KubernetesSource(str(path), "node-1", Wanted())
    try:
        await source.check()
    except VipdError as error:
        return f"{error} {error!r}"

    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        contextlib.aclosing(source.events()) as batches,
    ):
        async for events in batches:
            sync.take(events)
            if sync.problems:
                break
    return " ".join(f"{key} {error} {error!r}" for key, error in sync.problems.items())


def plugin(script: str) -> Json:
    told = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "/bin/sh",
        "args": ["-c", script],
        "env": [{"name": "SECRET", "value": SECRET}],
    }
    return {"exec": told}


async def _echo(request: web.Request) -> web.StreamResponse:
    """Refuse, and say again what was shown."""
    shown = request.headers.get("Authorization", "")
    scheme, _, told = shown.partition(" ")
    plain = base64.b64decode(told).decode() if scheme == "Basic" else ""
    return failure(401, "Unauthorized", f"who is {shown} or {plain} {'x' * 300}")


@contextlib.asynccontextmanager
async def serving(context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    server = ApiServer(Store())
    server.faults.append(_echo)
    port = await server.start(context=context)
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{port}"
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def refusing_proxy() -> AsyncIterator[str]:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        reason = " ".join(head.split())[:4000]
        writer.write(f"HTTP/1.1 407 {reason}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


NOBODY = "127.0.0.1:1"
USERS: dict[str, Json] = {
    "token": {"token": SECRET},
    "token of two lines": {"token": f"{SECRET}\n{SECRET}"},
    "token of other letters": {"token": f"{SECRET}\u2028\x00"},
    "password": {"username": "me", "password": SECRET},
    "plugin that fails": plugin("echo $SECRET; echo $SECRET >&2; exit 3"),
    "plugin of garbage": plugin("echo $SECRET $SECRET"),
    "plugin of another version": plugin(
        'echo "{\\"apiVersion\\":\\"$SECRET\\",\\"kind\\":\\"x\\",\\"status\\":{}}"'
    ),
    "plugin whose token is refused": plugin(
        'echo "{\\"apiVersion\\":\\"client.authentication.k8s.io/v1\\",'
        '\\"kind\\":\\"ExecCredential\\",\\"status\\":{\\"token\\":\\"$SECRET\\"}}"'
    ),
    "keys that are none": {"client-certificate-data": ENCODED, "client-key-data": ENCODED},
    "keys that are no text": {"client-certificate-data": SECRET, "client-key-data": SECRET},
    "auth provider": {"auth-provider": {"name": "oidc", "config": {"client-secret": SECRET}}},
}
CLUSTERS: dict[str, Json] = {
    "proxy that is away": {"proxy-url": f"http://me:{PASSWORD}@{NOBODY}"},
    "proxy that is no URL": {"proxy-url": f"me:{PASSWORD}@proxy"},
    "proxy of another scheme": {"proxy-url": f"socks5://me:{PASSWORD}@{NOBODY}"},
    "proxy with a port that is none": {"proxy-url": f"http://me:{PASSWORD}@host:port"},
    "server that is away": {"server": f"https://me:{PASSWORD}@{NOBODY}"},
    "server that is no URL": {"server": f"me:{PASSWORD}@{NOBODY}"},
    "name that is none": {"tls-server-name": "." * 300, "server": f"https://{NOBODY}"},
}


def check(said: str, capfd: pytest.CaptureFixture[str]) -> None:
    told = capfd.readouterr()
    for text in (said, told.out, told.err):
        for form in FORMS:
            assert form not in text
    assert said.isprintable()


@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
@pytest.mark.parametrize("over_tls", [True, False], ids=["tls", "plain"])
async def test_who_we_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], user: Json, over_tls: bool
) -> None:
    context = None
    if over_tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with serving(context) as server:
        kubeconfig(tmp_path / "kubeconfig", server, user, **{"insecure-skip-tls-verify": True})
        said = await what_is_said(tmp_path / "kubeconfig")
    assert said
    check(said, capfd)


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
async def test_the_way_to_the_server(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], cluster: Json
) -> None:
    user = {"token": SECRET}
    more = {**cluster}
    server = more.pop("server", f"http://{NOBODY}")
    kubeconfig(tmp_path / "kubeconfig", server, user, **more)
    said = await what_is_said(tmp_path / "kubeconfig")
    assert said
    check(said, capfd)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_refuses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], scheme: str
) -> None:
    async with refusing_proxy() as place:
        proxy = {"proxy-url": f"http://me:{PASSWORD}@{place}"}
        kubeconfig(tmp_path / "kubeconfig", f"{scheme}://192.0.2.1", {"token": SECRET}, **proxy)
        said = await what_is_said(tmp_path / "kubeconfig")
    assert "407" in said
    check(said, capfd)


async def test_a_certificate_that_is_not_trusted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with serving(context) as server:
        kubeconfig(tmp_path / "kubeconfig", server, {"token": SECRET})
        said = await what_is_said(tmp_path / "kubeconfig")
    assert "certificate" in said.lower()
    check(said, capfd)


SHAPES: tuple[Callable[[Json], object], ...] = (
    lambda told: told["users"][0].pop("user"),
    lambda told: told["users"].append({"token": SECRET}),
    lambda told: told["users"][0].update(user=[SECRET]),
    lambda told: told["users"][0].update(user=SECRET),
    lambda told: told["users"][0]["user"].update(token=[SECRET]),
    lambda told: told["users"][0]["user"].update(token={SECRET: SECRET}),
    lambda told: told["clusters"][0].update(token=SECRET, cluster=None),
    lambda told: told.update(users={"token": SECRET}),
)


@pytest.mark.parametrize("spoil", SHAPES)
async def test_a_file_of_another_shape(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[Json], object]
) -> None:
    path = tmp_path / "kubeconfig"
    kubeconfig(path, f"http://{NOBODY}", {"token": SECRET})
    told = yaml.safe_load(path.read_text())
    told["users"][0]["hint"] = SECRET
    spoil(told)
    path.write_text(yaml.safe_dump(told))
    said = await what_is_said(path)
    assert said
    check(said, capfd)


def _runs(pid: str) -> bool:
    """Being killed takes a moment; who is dead is a zombie until its new parent looks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


async def test_a_plugin_does_not_outlive_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vipd.proxy.sources.kubernetes import credentials

    monkeypatch.setattr(credentials, "PLUGIN_SECONDS", 0.5)
    script = f"sleep 600 & echo $$ $! > {tmp_path}/pids; sleep 600"
    path = tmp_path / "kubeconfig"
    kubeconfig(path, f"http://{NOBODY}", plugin(script))
    assert "took longer than" in await what_is_said(path)
    started = (tmp_path / "pids").read_text().split()
    await until(lambda: not any(map(_runs, started)))


async def test_a_plugin_that_never_stops_printing(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    kubeconfig(path, f"http://{NOBODY}", plugin("yes $SECRET"))
    assert "more than 1 MiB" in await what_is_said(path)


@pytest.mark.parametrize(("flag", "dumpable"), [("kubeconfig", "0"), ("manifests", "1")])
def test_credentials_are_in_no_core_dump(tmp_path: Path, flag: str, dumpable: str) -> None:
    """A process that holds them makes none; what it starts may again (prctl(2))."""
    kubeconfig(tmp_path / "file.yaml", f"http://{NOBODY}", {"token": SECRET})
    path = str(tmp_path / "file.yaml")
    code = (
        "import ctypes, subprocess, sys\n"
        "from vipd.proxy.cli.source import source\n"
        "from vipd.proxy.config import Flags, load\n"
        f"source(load(Flags({flag}={path!r} if {flag!r} == 'kubeconfig' else ({path!r},))))\n"
        "told = 'import ctypes; print(ctypes.CDLL(None).prctl(3))'\n"
        "subprocess.run([sys.executable, '-c', told], check=True)\n"
        "print(ctypes.CDLL(None).prctl(3), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", dumpable], done.stderr
