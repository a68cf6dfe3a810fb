"""The lock: one daemon for each network namespace, until its last holder ends."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vipd.proxy import instance
from vipd.proxy.errors import ConfigError, InUseError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Away from /run/vipd, where a real daemon of this machine would be."""
    monkeypatch.setattr(instance, "_folder", lambda fallback: fallback)
    return tmp_path


def test_a_second_one_is_refused_with_the_pid_of_the_first(folder: Path) -> None:
    lock = instance.take(folder)
    with pytest.raises(InUseError, match=rf"\b{os.getpid()}\b.* serves this network namespace"):
        instance.take(folder)
    os.close(lock)
    os.close(instance.take(folder))


def test_the_file_is_for_this_user_and_namespace(folder: Path) -> None:
    lock = instance.take(folder)
    (path,) = folder.iterdir()
    inode = os.stat("/proc/self/ns/net").st_ino
    assert path.name == f"netns-{inode}.lock"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == f"{os.getpid()}\n"
    os.close(lock)


def test_it_is_not_inherited_by_default(folder: Path) -> None:
    lock = instance.take(folder)
    assert os.get_inheritable(lock) is False
    os.close(lock)


def test_what_a_killed_daemon_left_running_is_waited_for(folder: Path) -> None:
    lock = instance.take(folder)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, pass_fds=[lock])
    (path,) = folder.iterdir()
    path.write_text("999999999\n")  # its pid is nobody's now
    os.close(lock)
    taken: list[int] = []
    waiting = threading.Thread(target=lambda: taken.append(instance.take(folder)))
    waiting.start()
    assert taken == []
    child.communicate(b"\n")
    waiting.join(20)
    assert len(taken) == 1
    assert path.read_text() == f"{os.getpid()}\n"
    os.close(taken[0])


def test_patience_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "PATIENCE_SECONDS", 0.05)
    lock = instance.take(folder)
    (path,) = folder.iterdir()
    path.write_text("")
    with pytest.raises(InUseError, match="of unknown pid"):
        instance.take(folder)
    os.close(lock)


def test_a_link_is_not_followed(folder: Path) -> None:
    inode = os.stat("/proc/self/ns/net").st_ino
    (folder / f"netns-{inode}.lock").symlink_to(folder / "elsewhere")
    with pytest.raises(ConfigError):
        instance.take(folder)


def test_a_folder_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        instance.take(folder / "none")
