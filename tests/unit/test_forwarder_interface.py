"""Where a connection or a datagram came in, by the real kernel, and what a place makes of it."""

import socket

import pytest

from vipd.backends.userspace.forwarder import interface
from vipd.backends.userspace.forwarder.sources import Sources
from vipd.backends.userspace.objects import Forwarding, Surroundings
from vipd.proxy.names import parse_address
from vipd.proxy.virtualserver import Endpoint

PLACE, NODE = map(parse_address, ("10.96.0.1", "192.0.2.1"))
HERE, AWAY = (Endpoint(parse_address(one), 80) for one in ("10.244.1.2", "10.244.2.2"))
LOCAL = Forwarding(owner="a/b:c", inside=(HERE, AWAY), outside=(HERE,))
families = pytest.mark.parametrize("host", ["127.0.0.1", "::1"])


@families
def test_a_connection_tells_its_interface(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2]),
    ):
        accepted, _ = listener.accept()
        with accepted:
            assert interface.of_connection(accepted) == "lo"


@families
def test_a_datagram_tells_its_interface(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.socket(family, socket.SOCK_DGRAM) as bound,
        socket.socket(family, socket.SOCK_DGRAM) as client,
    ):
        bound.bind((host, 0))
        interface.ask(bound)
        client.sendto(b"here", bound.getsockname())
        buffer = bytearray(8)
        size, beside, _, _ = bound.recvmsg_into([buffer], interface.SPACE)
        assert bytes(buffer[:size]) == b"here"
        assert interface.of_datagram(beside) == "lo"


def test_nothing_told_is_no_interface() -> None:
    assert interface.of_datagram([]) == ""


@pytest.mark.parametrize(
    ("wanted", "came_by", "inside"),
    [
        ("cni0", "cni0", True),
        ("cni0", "cni01", False),
        ("veth*", "veth7f", True),
        ("veth*", "eth0", False),
        ("veth*", "", False),
    ],
)
def test_a_pod_is_who_comes_by_its_interface(wanted: str, came_by: str, inside: bool) -> None:
    sources = Sources(LOCAL, Surroundings(own=(NODE,), interface=wanted), PLACE)
    assert sources.asks_interface
    for client in ("203.0.113.5", "10.244.1.9"):
        sources.came_by(client, came_by)
        assert sources.is_inside(client) is inside
        sources.came_by(client, "cni0" if wanted == "cni0" else "veth1")
        assert sources.is_inside(client)


def test_the_node_is_inside_wherever_it_comes_by() -> None:
    sources = Sources(LOCAL, Surroundings(own=(NODE,), interface="cni0"), PLACE)
    for client in (NODE, PLACE, "127.0.0.1"):
        sources.came_by(str(client), "lo")
        assert sources.is_inside(str(client))


def test_nobody_is_asked_where_it_makes_no_difference() -> None:
    same = Forwarding(owner="a/b:c", inside=(HERE,), outside=(HERE,))
    assert not Sources(same, Surroundings(interface="cni0"), PLACE).asks_interface
    assert not Sources(LOCAL, Surroundings(), PLACE).asks_interface
