"""Local routes: the messages, held against those that pyroute2 encodes, and what they do."""

import errno
import subprocess
import sys
from collections.abc import Sequence

import pytest
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from vipd.backends import local_routes, netlink
from vipd.backends.local_routes import LocalRoutes, Verb, Wanted
from vipd.backends.netlink import ADDRESS_FAMILY
from vipd.proxy.errors import Rejected, UnknownResult, Unsupported
from vipd.proxy.names import Family, parse_address


@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize(
    ("verb", "kind", "flags"), [("add", 24, 0x605), ("replace", 24, 0x505), ("del", 25, 0x5)]
)
def test_a_route(family: Family, verb: Verb, kind: int, flags: int) -> None:
    address, source = (
        ("10.96.0.1", "192.168.0.1") if family is Family.IPV4 else ("fd00::1", "fd00:1::1")
    )
    message = rtmsg()
    message["header"]["type"], message["header"]["flags"] = kind, flags
    message["family"], message["dst_len"] = (
        ADDRESS_FAMILY[family],
        32 if family is Family.IPV4 else 128,
    )
    message["table"], message["proto"], message["type"] = 255, 118, 2
    message["scope"] = 254 if family is Family.IPV4 else 0
    message["attrs"] = [("RTA_DST", address), ("RTA_OIF", 1)]
    if verb != "del":
        message["attrs"].append(("RTA_PREFSRC", source))
    message.encode()
    made = local_routes.message(Wanted(verb, parse_address(address), source), 118)
    assert made == bytes(message.data)


def test_a_route_of_the_dns_server_stands_beside_that_of_a_mode() -> None:
    wanted = Wanted("add", parse_address("10.96.0.10"))
    message = rtmsg(local_routes.message(wanted, local_routes.DNS_ROUTE_PROTOCOL))
    message.decode()
    assert message.get_attr("RTA_PRIORITY") not in (None, 0, 1024)  # the modes' in each family


REMEMBERING = """
import ipaddress, socket, subprocess
from vipd.backends.local_routes import LocalRoutes, Wanted
from vipd.proxy.sources import addresses

for command in (
    "link set lo up", "link add here type veth peer there", "link set here up",
    "addr add fd00:1::1/64 dev here nodad", "neigh add fd00:1::2 lladdr 02:00:00:00:00:02 dev here",
    "-6 route add default via fd00:1::2",
):
    subprocess.run(["ip", *command.split()], check=True)
client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
client.connect(("fd00:9::1", 53))
client.send(b"out of the node")
watching = addresses._subscribe()
assert LocalRoutes(119).change([Wanted("add", ipaddress.ip_address("fd00:9::1"))]) == {}
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(("::", 53))
server.settimeout(10)
client.send(b"to the node")
assert server.recv(100) == b"to the node"
there = subprocess.run(["ip", "-6", "addr", "show", "dev", "lo"], capture_output=True).stdout
assert b"100::" not in there
assert addresses._is_of_loopback(watching.recv(1 << 16)), "nobody reads all addresses for it"
"""


class Kernel:
    """Answers the routes of a batch with these errors, and loses what it says of another batch."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.batches = 0

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def request(self, batch: Sequence[bytes]) -> list[int]:
        self.batches += 1
        if self.batches > 1:
            raise UnknownResult("netlink: No buffer space available")
        assert len(batch) == len(self.codes)
        return self.codes


WANTED = [Wanted("add", parse_address(one)) for one in ("10.96.0.1", "fd00::1", "fd00::2")]


def answered(monkeypatch: pytest.MonkeyPatch, *codes: int) -> tuple[dict[Wanted, str], int]:
    """What is told of routes that the kernel answers so, and how many batches it was sent."""
    kernel = Kernel(*codes)
    monkeypatch.setattr(netlink, "routes", lambda: kernel)
    found = LocalRoutes(119).change(WANTED)
    assert all(isinstance(one, Rejected) for one in found.values())
    return {one: str(error) for one, error in found.items()}, kernel.batches


def test_answers_that_are_lost_for_what_comes_after_the_routes_lose_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, batches = answered(monkeypatch, 0, 0, errno.ENOMEM)
    assert list(told) == WANTED[2:]
    assert batches == 2


@pytest.mark.parametrize("code", [errno.EACCES, errno.EOPNOTSUPP])
def test_without_ipv6_its_routes_are_rejected_and_no_others(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    told, batches = answered(monkeypatch, 0, code, code)
    assert list(told) == WANTED[1:]
    assert all("fd00::" in one and "IPv6 is switched off on lo" in one for one in told.values())
    assert batches == 1, "no socket has to forget a route"


def test_only_who_is_allowed_nothing_lacks_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(answered(monkeypatch, 0, errno.EPERM, 0)[0]) == WANTED[1:2]
    with pytest.raises(Unsupported, match="CAP_NET_ADMIN"):
        answered(monkeypatch, errno.EPERM, errno.EPERM, errno.EPERM)


@pytest.mark.netns
def test_a_socket_that_is_connected_sees_a_new_local_route() -> None:
    done = subprocess.run(
        ["unshare", "-Urn", sys.executable, "-c", REMEMBERING], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
