"""What processes that stay do not import: megabytes and a tenth of a second each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vipd.proxy.cli.main import _may_ask_api_server

HEAVY = ("ssl", "_ssl", "_hashlib", "rich", "pyroute2", "watchfiles", "anyio")
ON_REQUEST = ("prometheus_client",)
DNSPYTHON = ("dns.message", "dns.name")
DAEMON = """
sys.argv = ["vipd", *{words!r}, "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
from vipd.backends.registry import MODES, backend
from vipd.dns.server import alone
from vipd.proxy import daemon
from vipd.proxy.sources import manifests
for mode in MODES:
    backend(mode)
"""
PROCESS = """
sys.argv = ["one"]  # it ends where it misses its arguments, when everything is imported
with contextlib.suppress(IndexError):
    runpy.run_module({name!r}, run_name="__main__")
"""


def imported(script: str) -> set[str]:
    """Return the modules that a fresh interpreter has after a script."""
    head = "import contextlib, io, runpy, sys\n"
    tail = "\nimport json\nprint(json.dumps([one for one in sys.modules if sys.modules[one]]))"
    done = subprocess.run(
        [sys.executable, "-c", head + script + tail], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("words", [["run"], ["dns", "serve"]], ids=" ".join)
def test_the_daemon_goes_without(words: list[str]) -> None:
    told = [*words, "--manifests", "."]  # an API server needs OpenSSL
    found = imported("from vipd.proxy.cli.main import main" + DAEMON.format(words=told))
    assert {"vipd.proxy.daemon", "vipd.backends.ipset", "structlog"} <= found
    assert found.isdisjoint((*HEAVY, *DNSPYTHON, *ON_REQUEST))


def test_openssl_can_be_had_after_all() -> None:
    script = """
from vipd.proxy import lean
lean.without_openssl()
import aiohttp.web  # as the daemon does before somebody asks for metrics
lean.with_openssl()
import prometheus_client
from urllib.request import HTTPSHandler
from http.client import HTTPSConnection
"""
    assert {"ssl", "aiohttp.web", "prometheus_client"} <= imported(script)


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("vipd.backends.userspace.forwarder", (*HEAVY, *DNSPYTHON, "structlog", "click")),
        ("vipd.dns.server", (*HEAVY, "structlog", "click")),
    ],
)
def test_workers_go_without(name: str, without: tuple[str, ...]) -> None:
    found = imported(PROCESS.format(name=name))
    assert {f"{name}.worker", "asyncio"} <= found
    assert found.isdisjoint(without)


def test_hashes_are_there_without_openssl() -> None:
    script = """
from vipd.proxy.lean import without_openssl
without_openssl()
import hashlib, hmac, secrets
for name in ("md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b"):
    assert len(hashlib.new(name, b"x").hexdigest()) >= 32
"""
    assert "hashlib" in imported(script)


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("mode: ipvs\nmanifests: [/m]\n", False),
        ('{"kind": "x", "manifests": ["/m"]}', False),
        ("mode: ipvs\n# manifests: [/m]\n", True),
        ("kubeconfig: /etc/manifests/k\n", True),
        ("kubeconfig: /k # not manifests: [/m]\n", True),
    ],
)
def test_openssl_stays_where_a_file_may_lead_to_an_api_server(
    tmp_path: Path, text: str, may: bool
) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    assert _may_ask_api_server(["vipd", "run", "--config", str(file)]) is may
    assert _may_ask_api_server(["vipd", "run", f"--config={file}"]) is may
    assert _may_ask_api_server(["vipd", "run", f"--config={file}", "--kubeconfig", "/k"])
    assert not _may_ask_api_server(["vipd", "run", f"--config={file}", "--manifests=/m"])
