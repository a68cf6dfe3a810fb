"""How all tests share one machine: side by side in a few processes, each with a /run of its own.

`make test` lets pytest-xdist run two processes. A file is run by one of them, in its order, so that
what a module sets up is set up once; of files that take minutes, each class is a part of its own.
"""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

FIRST = ("netns/test_switch.py", "netns/", "vm/", "properties/")
"""What takes long is begun first, so that in the end no process is left alone with it."""
BY_CLASS = ("tests/netns/test_switch.py",)
_CLONE_NEWNS, _MS_BIND, _MS_PRIVATE = 0x20000, 0x1000, 1 << 18


def pytest_configure(config: pytest.Config) -> None:
    divides = getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")
    if divides:
        config.option.loadscopereorder = False
    else:
        own_run()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    """Keeps the order within the files that have the same."""
    found = (at for at, part in enumerate(FIRST) if f"tests/{part}" in item.nodeid)
    return next(found, len(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Say which tests go to the same process: those of a file, or of a class of a long one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path, *rest = nodeid.split("::")
            return "::".join([path, *rest[:-1]]) if path in BY_CLASS else path

    return ByFile(config, log)


def own_run() -> None:
    """Let this process, and what it starts, have the files in /run that daemons share for itself.

    They belong to the machine, not to a network namespace: two labs would meet in them. Where this
    is not allowed there is no lab either.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    folder, lock = Path("/run/vipd"), Path("/run/xtables.lock")
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        lock.touch(0o600)
    if os.geteuid() != 0 or libc.unshare(_CLONE_NEWNS) != 0:
        return
    for parent in ("/", "/run"):  # what is mounted below it is for nobody else
        libc.mount(None, parent.encode(), None, _MS_PRIVATE, None)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, None) == 0:
        own = folder / lock.name
        own.touch(0o600)
        libc.mount(bytes(own), bytes(lock), None, _MS_BIND, None)
