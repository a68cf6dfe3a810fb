"""Netlink sockets: what is said where none can be had, and that their ports tell who it was."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vipd.backends import netlink
from vipd.backends.ipvs.kernel import Kernel
from vipd.backends.runs import RUNS
from vipd.proxy.errors import Busy

PID_MAX_LIMIT = 1 << 22


@pytest.fixture
def no_more_files() -> Iterator[None]:
    """Let this process open no more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.open("/", os.O_RDONLY)
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("no_more_files")
@pytest.mark.parametrize("make", [netlink.routes, netlink.netfilter, netlink.generic])
def test_too_many_open_files_are_tried_again(make: Callable[[], object]) -> None:
    with pytest.raises(Busy, match="Too many open files"):
        make()


@pytest.mark.usefixtures("no_more_files")
def test_ipvs_that_cannot_be_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipd.backends.ipvs.kernel.LISTING", Path("/proc/self/stat"))
    with pytest.raises(Busy, match="Too many open files"):
        Kernel().everything()


def test_no_process_has_the_port_of_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    ports: list[int] = []
    monkeypatch.setattr(RUNS, "note_port", ports.append)
    with netlink.routes(), netlink.netfilter(), netlink.routes():
        assert len(set(ports)) == 3
    assert min(ports) > PID_MAX_LIMIT


def test_a_port_that_is_taken_is_not_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [b"\x01\x02\x03\x04"] * 2 + [b"\x01\x02\x03\x05"]
    monkeypatch.setattr(os, "urandom", lambda count: drawn.pop(0))
    with netlink.routes(), netlink.routes():
        assert drawn == []
