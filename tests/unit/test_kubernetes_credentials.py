"""Credentials of every kind, shown to a server that looks at them, over TLS where there is any."""

import asyncio
import base64
import contextlib
import json
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trustme
import yaml
from aiohttp import web

from vipd.bench.api_server import ApiServer, failure
from vipd.bench.api_store import Json, Store
from vipd.proxy.errors import ConfigError, SourceError
from vipd.proxy.sources.kubernetes import credentials
from vipd.proxy.sources.kubernetes.api import Api, ApiError
from vipd.proxy.sources.kubernetes.credentials import Credentials
from vipd.proxy.sources.kubernetes.pace import Pace

SECRET = "s3cr3t-t0ken"
Write = Callable[..., str]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def made(server: str, user: Json | None = None, **cluster: object) -> str:
        told = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
            "users": [{"name": "u", "user": user or {}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(told))
        return str(path)

    return made


@contextlib.asynccontextmanager
async def serving(
    tokens: set[str] | None = None, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[ApiServer, str]]:
    server = ApiServer(Store(), tokens=tokens)
    port = await server.start(context=context)
    try:
        yield server, f"{'https' if context else 'http'}://127.0.0.1:{port}"
    finally:
        await server.stop()


async def asked(path: str | None, clock: Clock | None = None) -> None:
    """Ask something with these credentials. Raise what comes of it."""
    api = Api(Credentials(path, clock or Clock()))
    try:
        await api.get("/api/v1/services", {})
    finally:
        await api.close()


def tls(authority: trustme.CA, *names: str, clients: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    if clients:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


async def test_a_token(write: Write) -> None:
    async with serving({SECRET}) as (_, server):
        await asked(write(server, {"token": SECRET}))
        with pytest.raises(ApiError, match="401 Unauthorized"):
            await asked(write(server, {"token": "another"}))


async def test_a_token_in_a_file_that_changes(write: Write, tmp_path: Path) -> None:
    file, clock = tmp_path / "token", Clock()
    file.write_text("first")
    async with serving({"first", "second"}) as (api_server, server):
        api = Api(Credentials(write(server, {"tokenFile": str(file)}), clock))
        await api.get("/api/v1/services", {})
        file.write_text("second")
        clock.now += credentials.FRESH_SECONDS  # read again because it is old
        api_server.tokens = {"second"}
        await api.get("/api/v1/services", {})
        file.write_text("third")
        api_server.tokens = {"third"}
        with pytest.raises(ApiError, match="401"):
            await api.get("/api/v1/services", {})
        await api.get("/api/v1/services", {})  # read again because it was not accepted
        await api.close()


async def test_name_and_password(write: Write) -> None:
    told = []

    async def look(request: web.Request) -> None:
        told.append(request.headers.get("Authorization"))

    async with serving() as (api_server, server):
        api_server.faults.append(look)
        await asked(write(server, {"username": "me", "password": "pass"}))
    assert told == [f"Basic {encoded(b'me:pass')}"]


@pytest.mark.parametrize("as_data", [True, False], ids=["data", "files"])
async def test_certificates(
    write: Write, authority: trustme.CA, tmp_path: Path, as_data: bool
) -> None:
    mine = authority.issue_cert("node-1")
    authority_text = authority.cert_pem.bytes()
    chain, key = mine.cert_chain_pems[0].bytes(), mine.private_key_pem.bytes()
    user: Json
    if as_data:
        cluster = {"certificate-authority-data": encoded(authority_text)}
        user = {"client-certificate-data": encoded(chain), "client-key-data": encoded(key)}
    else:
        for name, text in (("ca", authority_text), ("cert", chain), ("key", key)):
            (tmp_path / name).write_bytes(text)
        cluster = {"certificate-authority": "ca"}  # beside the kubeconfig
        user = {"client-certificate": "cert", "client-key": str(tmp_path / "key")}
    async with serving(context=tls(authority, "127.0.0.1", clients=True)) as (_, server):
        await asked(write(server, user, **cluster))
        with pytest.raises(ApiError):
            await asked(write(server, {}, **cluster))


async def test_who_the_server_is_matters(write: Write, authority: trustme.CA) -> None:
    data = {"certificate-authority-data": encoded(authority.cert_pem.bytes())}
    async with serving(context=tls(authority, "api.example")) as (_, server):
        with pytest.raises(ApiError, match=r"(?i)certificate"):
            await asked(write(server, {}, **data))
        await asked(write(server, {}, **data, **{"tls-server-name": "api.example"}))
        with pytest.raises(ApiError, match=r"(?i)certificate"):
            await asked(write(server))
        await asked(write(server, {}, **{"insecure-skip-tls-verify": True}))


PLUGIN = """
import json, os, pathlib, sys
assert json.loads(os.environ["KUBERNETES_EXEC_INFO"])["kind"] == "ExecCredential"
count = pathlib.Path({count!r})
count.write_text(str(int(count.read_text() if count.exists() else 0) + 1))
print(json.dumps({{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
    "status": {{**json.loads(sys.argv[1]), "token": os.environ["PREFIX"] + count.read_text()}}}}))
"""


def plugin(tmp_path: Path, **status: object) -> tuple[Json, Path]:
    script, count = tmp_path / "plugin.py", tmp_path / "count"
    script.write_text(PLUGIN.format(count=str(count)))
    told = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": sys.executable,
        "args": [str(script), json.dumps(status)],
        "env": [{"name": "PREFIX", "value": "token-"}],
        "interactiveMode": "Never",
    }
    return {"exec": told}, count


async def test_a_plugin_is_asked_again_when_what_it_said_expires(
    write: Write, tmp_path: Path
) -> None:
    user, count = plugin(tmp_path, expirationTimestamp="2126-01-01T00:00:00Z")
    clock = Clock()
    async with serving({"token-1"}) as (api_server, server):
        api = Api(Credentials(write(server, user), clock))
        await api.get("/api/v1/services", {})
        clock.now += credentials.FRESH_SECONDS
        await api.get("/api/v1/services", {})
        assert count.read_text() == "1", "it is good for a hundred years"
        api_server.tokens = {"token-2"}
        with pytest.raises(ApiError, match="401"):
            await api.get("/api/v1/services", {})
        await api.get("/api/v1/services", {})
        await api.close()


async def test_a_plugin_that_fails_or_hangs(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command, why in (("/bin/false", "status 1"), ("/nowhere/plugin", "/nowhere/plugin")):
        told = {"apiVersion": "client.authentication.k8s.io/v1", "command": command}
        with pytest.raises(SourceError, match=why):
            await asked(write("https://127.0.0.1:1", {"exec": told}))
    monkeypatch.setattr(credentials, "PLUGIN_SECONDS", 0.2)
    hangs = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "/bin/sleep",
        "args": ["60"],
    }
    with pytest.raises(SourceError, match="took longer than"):
        await asked(write("https://127.0.0.1:1", {"exec": hangs}))


async def test_a_proxy(write: Write) -> None:
    seen: list[str] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readline()).decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    proxy = await asyncio.start_server(relay, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    await asked(write("http://192.0.2.1:6443", {}, **{"proxy-url": f"http://127.0.0.1:{port}"}))
    proxy.close()
    assert seen[0].startswith("GET http://192.0.2.1:6443/api/v1/services ")


@pytest.fixture
def pod(tmp_path: Path, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "serviceaccount"
    folder.mkdir()
    (folder / "token").write_text("first\n")
    (folder / "ca.crt").write_bytes(authority.cert_pem.bytes())
    monkeypatch.setattr(credentials, "SERVICE_ACCOUNT", str(folder))
    return folder


async def test_what_a_pod_is_given(
    pod: Path, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    async with serving({"first"}, tls(authority, "127.0.0.1")) as (api_server, server):
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", server.rpartition(":")[2])
        api = Api(Credentials(None, clock))
        await api.get("/api/v1/services", {})
        (pod / "token").write_text("second")
        api_server.tokens = {"second"}
        clock.now += credentials.FRESH_SECONDS
        await api.get("/api/v1/services", {})
        await api.close()


async def test_outside_of_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SourceError, match=r"in-cluster credentials: .*not set"):
        await Credentials(None, Clock()).access()


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ("", (SourceError, ConfigError), "kubeconfig"),
        ("[]", (SourceError, ConfigError), "kubeconfig"),
        (f"users: [{{token: {SECRET}\n", ConfigError, "is no YAML"),
        (f"token: {SECRET}", (SourceError, ConfigError), "kubeconfig"),
        ('{"current-context": "x", "contexts": [], "clusters": []}', SourceError, "x"),
    ],
)
async def test_a_file_that_is_none(
    tmp_path: Path, text: str, error: type[Exception], why: str
) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(error, match=why) as raised:
        await Credentials(str(path), Clock()).access()
    assert SECRET not in str(raised.value)
    assert raised.value.__cause__ is None or SECRET not in str(raised.value.__cause__)


async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"(?i)no such file"):
        await Credentials(str(tmp_path / "none"), Clock()).access()


async def test_keys_that_are_none(write: Write) -> None:
    user = {"client-certificate-data": encoded(b"x"), "client-key-data": encoded(b"y")}
    with pytest.raises(ConfigError, match="certificate or key"):
        await asked(write("https://127.0.0.1:1", user))
    with pytest.raises((ConfigError, SourceError)):
        await asked(write("ftp://127.0.0.1:1"))


async def test_secrets_do_not_stay_in_files_or_texts(
    write: Write, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    mine = authority.issue_cert("node-1")
    user = {
        "token": SECRET,
        "client-certificate-data": encoded(mine.cert_chain_pems[0].bytes()),
        "client-key-data": encoded(mine.private_key_pem.bytes()),
    }
    access = await Credentials(write("https://127.0.0.1:1", user), Clock()).access()
    assert access.authorization == f"Bearer {SECRET}"
    assert SECRET not in f"{access!r} {access}"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_rest_of_the_client_library_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from vipd.proxy.sources.kubernetes import credentials\n"
        "credentials._library()\n"
        "print(*(one for one in sys.modules if one.startswith('kubernetes_asyncio.client.')))\n"
    )
    alone = [sys.executable, "-c", code]
    found = subprocess.run(alone, capture_output=True, text=True, check=True).stdout.split()
    assert found
    assert not [one for one in found if one.partition("client.")[2].startswith(("models", "api"))]


async def test_a_token_that_cannot_be_read_for_a_moment_is_good_until_it_is_refused(
    tmp_path: Path, write: Write
) -> None:
    token = tmp_path / "token"
    token.write_text(SECRET)
    async with serving({SECRET}) as (_, address):
        clock = Clock()
        known = Credentials(write(address, {"tokenFile": str(token)}), clock)
        first = await known.access()
        token.unlink()
        clock.now += credentials.FRESH_SECONDS + 1
        assert await known.access() is first
        known.doubt(first)
        with pytest.raises(SourceError, match="token"):
            await known.access()


async def test_how_long_a_server_asks_to_be_left_alone(write: Write) -> None:
    store = Store()
    server = ApiServer(store)

    async def fault(request: web.Request) -> web.StreamResponse | None:
        return failure(429, "TooManyRequests", "slow down", **{"Retry-After": "7"})

    server.faults.append(fault)
    port = await server.start()
    api = Api(Credentials(write(f"http://127.0.0.1:{port}"), Clock()))
    try:
        with pytest.raises(ApiError) as caught:
            await api.get("/api/v1/services", {})
        assert caught.value.retry_after == 7
        assert Pace(lambda: 0.0).failed(caught.value.retry_after) == 7
    finally:
        await api.close()
        await server.stop()
