"""The lock: one daemon for each network namespace, until its last holder ends."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from vipd.proxy import instance
from vipd.proxy.errors import InUseError


@pytest.fixture(autouse=True)
def name(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A name of our own: a real daemon may run in this network namespace."""
    own = f"\0vipd-test-{os.getpid()}".encode()
    monkeypatch.setattr(instance, "NAME", own)
    return own


def test_a_second_one_is_refused_with_the_pid_of_the_first() -> None:
    with (
        instance.take(),
        pytest.raises(InUseError, match=rf"pid {os.getpid()}\b.* serves this network namespace"),
    ):
        instance.take()
    instance.take().close()


def test_it_is_not_inherited_by_default() -> None:
    with instance.take() as lock:
        assert os.get_inheritable(lock.fileno()) is False


def test_what_a_killed_daemon_left_running_is_waited_for(name: bytes) -> None:
    # The holder listens, hands the socket to a child, and ends, as a killed daemon does to its nft.
    program = (
        "import socket, subprocess, sys\n"
        "lock = socket.socket(socket.AF_UNIX)\n"
        "lock.bind(bytes.fromhex(sys.argv[1]))\n"
        "lock.listen(4096)\n"
        "subprocess.Popen([sys.executable, '-c', 'input()'], pass_fds=[lock.fileno()])\n"
    )
    reading, writing = os.pipe()
    with open(writing, "wb") as held:
        subprocess.run([sys.executable, "-c", program, name.hex()], stdin=reading, check=True)
        os.close(reading)
        taken: list[socket.socket] = []
        waiting = threading.Thread(target=lambda: taken.append(instance.take()))
        waiting.start()
        assert taken == []
        held.write(b"\n")
    waiting.join(20)
    assert len(taken) == 1
    taken[0].close()


def test_patience_ends(name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(instance, "_alive", lambda pid: False)
    with instance.take(), pytest.raises(InUseError):
        instance.take()


def test_a_stranger_who_took_the_name_does_not_keep_vipd_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with instance.take():
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        instance.take().close()


def test_namespaces_are_apart(name: bytes) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to enter another network namespace")
    program = "import socket, sys\nsocket.socket(socket.AF_UNIX).bind(bytes.fromhex(sys.argv[1]))\n"
    with instance.take():
        subprocess.run(["unshare", "--net", sys.executable, "-c", program, name.hex()], check=True)
