"""systemd's notifications, told to a real socket."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vipd.proxy.notify import notify, watchdog, watchdog_interval_seconds


@pytest.fixture(autouse=True)
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["path", "abstract"])
def listening(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify")
    if request.param == "abstract":
        name = f"@vipd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(name.replace("@", "\0"))
        made.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield made


def test_a_message_arrives(listening: socket.socket) -> None:
    notify("READY=1")
    assert listening.recv(100) == b"READY=1"


def test_silent_without_systemd() -> None:
    notify("READY=1")


@pytest.mark.parametrize("path", ["/nonexistent/notify", "@nobody-listens", "x" * 200])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    notify("READY=1")


def test_a_full_socket_does_not_block(listening: socket.socket) -> None:
    for _ in range(10_000):
        notify("WATCHDOG=1")
    assert listening.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [
        ("", "", None),
        ("ten", "", None),
        ("-5", "", None),
        ("30000000", "", 15.0),
        ("30000000", "own", 15.0),
        ("30000000", "1", None),
    ],
)
def test_how_often(
    monkeypatch: pytest.MonkeyPatch, microseconds: str, pid: str, seconds: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert watchdog_interval_seconds() == seconds


async def test_the_watchdog_is_fed(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    feeding = asyncio.ensure_future(watchdog())
    for _ in range(3):
        assert await asyncio.to_thread(listening.recv, 100) == b"WATCHDOG=1"
    feeding.cancel()


async def test_the_watchdog_is_not_fed_where_nobody_asks() -> None:
    await watchdog()
