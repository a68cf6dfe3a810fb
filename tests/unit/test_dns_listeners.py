"""Who may have had a place at which DNS is to be answered."""

import resource
import subprocess
import sys

import pytest

from vipd.dns.server.listeners import http_listener, pair
from vipd.dns.settings import Listen
from vipd.proxy.errors import ConfigError
from vipd.proxy.names import parse_address

HOLD = """
import socket, sys
held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
held.bind(("127.0.0.1", 0))
held.listen()
print(held.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("module", "is_left"),
    [("vipd.backends.userspace.forwarder", True), ("somebody.elses", False)],
)
def test_a_worker_of_userspace_mode_leaves_its_place(module: str, is_left: bool) -> None:
    command = [sys.executable, "-c", HOLD, module]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        listen = Listen(parse_address("127.0.0.1"), int(holder.stdout.readline()))
        if is_left:
            for one in pair(listen, 1 << 16, fresh=True):
                one.close()
        else:
            with pytest.raises(ConfigError, match=rf"already in use: .*pid {holder.pid}"):
                pair(listen, 1 << 16, fresh=True)
        holder.stdin.close()


def test_without_descriptors_it_is_an_address_that_cannot_be_had() -> None:
    """So it is tried again; any other error would end who tries."""
    listen = Listen(parse_address("127.0.0.1"), 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(ConfigError, match="Too many open files"):
            http_listener(listen)
        with pytest.raises(ConfigError, match="Too many open files"):
            pair(listen, 1 << 16, fresh=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
