"""Who may see whose address in userspace mode, and what is done where the kernel forbids it."""

import errno
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from vipd.backends.netlink import ADDRESS_FAMILY, HEADER, Netlink
from vipd.backends.userspace import policy_routing
from vipd.backends.userspace.backend import UserspaceCompiler
from vipd.backends.userspace.forwarder import transparent
from vipd.backends.userspace.forwarder.sources import Sources
from vipd.backends.userspace.forwarder.transparent import Transparent
from vipd.backends.userspace.messages import (
    answer_of,
    encode,
    forwarding_of,
    wire_forwarding,
)
from vipd.backends.userspace.objects import Forwarding, Place, ReturnPath, Surroundings
from vipd.backends.userspace.plan import expected
from vipd.backends.userspace.policy_routing import wrong_settings
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import (
    Family,
    NamespacedName,
    Protocol,
    ServicePortName,
    parse_address,
    parse_network,
)
from vipd.proxy.settings import DataplaneSettings, UserspaceSettings
from vipd.proxy.virtualserver import (
    Changes,
    Endpoint,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    Use,
    VirtualServer,
)

VIP, NODE, POD, AWAY, OUTSIDE = map(
    parse_address, ("10.96.0.1", "192.0.2.1", "10.244.1.2", "10.244.2.2", "198.51.100.7")
)
HERE = Endpoint(POD, 80, local=True)
KEY = Key(Family.IPV4, VIP, Protocol.TCP, 80)
NETWORK = NodeNetwork(own_addresses=(NODE,))
COMPILER = UserspaceCompiler(DataplaneSettings(userspace=UserspaceSettings(transparent=True)))


def server(*endpoints: Endpoint, masquerade: Masquerade = Masquerade.NEVER) -> VirtualServer:
    owner = ServicePortName(NamespacedName("a", "b"), "c", Protocol.TCP)
    return VirtualServer(
        key=KEY,
        owner=owner,
        kind=Kind.CLUSTER,
        cluster=endpoints,
        local=(),
        masquerade=masquerade,
    )


def compiled(one: VirtualServer) -> tuple[Forwarding, bool]:
    """How its place is served, and whether there is a return path."""
    things = expected(COMPILER.compile([one], NETWORK)).things
    forwarding = things[Place(Family.IPV4, Protocol.TCP, VIP, 80)]
    assert isinstance(forwarding, Forwarding)
    return forwarding, things.get(ReturnPath(Family.IPV4)) == "0x1000"


@pytest.mark.parametrize(
    ("masquerade", "shown", "for_pods"),
    [
        (Masquerade.NEVER, (POD,), False),
        (Masquerade.OFF_CLUSTER, (POD,), True),
        (Masquerade.ALWAYS, (), False),
    ],
)
def test_pods_of_this_node_see_whom_the_table_does_not_masquerade(
    masquerade: Masquerade, shown: tuple[object, ...], for_pods: bool
) -> None:
    made = server(HERE, Endpoint(AWAY, 80), masquerade=masquerade)
    forwarding, has_path = compiled(made)
    assert (forwarding.transparent, forwarding.transparent_for_pods) == (shown, for_pods)
    assert has_path == bool(shown)
    assert forwarding_of(wire_forwarding(forwarding)) == forwarding


def test_what_answers_from_the_node_itself_sees_the_node() -> None:
    forwarding, has_path = compiled(server(Endpoint(NODE, 80, local=True), Endpoint(AWAY, 80)))
    assert (forwarding.transparent, has_path) == ((), False)


def test_off_nothing_is_there() -> None:
    program = UserspaceCompiler().compile([server(HERE)], NETWORK)
    assert not any(isinstance(one, ReturnPath) for one in expected(program).things)
    assert "transparent" not in str(UserspaceCompiler().plan(None, program)[0])


def test_a_plan_tells_the_return_path_and_a_dump_keeps_it() -> None:
    program = COMPILER.compile([server(HERE)], NETWORK)
    text = str(COMPILER.plan(None, program)[0])
    rule = "ip rule add pref 90 fwmark 0x1000/0x1000 lookup 119 protocol 119\n"
    assert rule in text
    assert text.index(rule) < text.index("listen 10.96.0.1:80/TCP")
    seen = COMPILER.load(COMPILER.dump(program))
    assert not COMPILER.plan(seen, program)[0]
    damaged = structs.replace(seen, things={**seen.things, ReturnPath(Family.IPV4): "incomplete"})
    again = str(COMPILER.plan(damaged, program)[0])
    assert rule.replace("add", "replace") in again
    gone = str(COMPILER.plan_changes(program, Changes({KEY: None}))[0])
    assert "nft delete table ip vipd-transparent" in gone


def sources(*, for_pods: bool = False, interface: str = "", use: Use = Use.CLUSTER) -> Sources:
    inside = (Endpoint(POD, 80),)
    forwarding = Forwarding(
        owner="a/b:c",
        inside=inside,
        outside=inside if use is Use.CLUSTER else (),
        transparent=(POD,),
        transparent_for_pods=for_pods,
    )
    pods = () if interface else (parse_network("10.244.0.0/16"), parse_network("fd00:1::/32"))
    return Sources(forwarding, Surroundings(pods, (NODE,), interface), VIP)


def test_the_node_itself_is_never_shown() -> None:
    asked = sources()
    for one in (str(NODE), str(VIP), "127.0.0.1", "fe80::1%eth0"):
        assert not asked.shows(one, POD)
    assert asked.shows(str(OUTSIDE), POD)
    assert not asked.shows(str(OUTSIDE), AWAY)


def test_pods_are_told_by_their_ranges_or_by_where_they_come_in() -> None:
    asked = sources(for_pods=True)
    assert not asked.asks_interface
    assert asked.shows(str(AWAY), POD)
    assert not asked.shows(str(OUTSIDE), POD)
    asked = sources(for_pods=True, interface="cali*")
    assert asked.asks_interface
    assert not asked.shows(str(AWAY), POD)
    for interface, shown in (("cali7", True), ("eth0", False), ("cali7", True)):
        asked.came_by(str(AWAY), interface)
        assert asked.shows(str(AWAY), POD) == shown
    asked.came_by(str(NODE), "cali7")
    assert not asked.shows(str(NODE), POD)
    assert not sources(interface="cali*").asks_interface


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(5)
        yield made


@pytest.mark.parametrize(
    ("problems", "bound", "counters"),
    [
        ([0], 1, (1, 0)),
        ([errno.EADDRINUSE, 0], 2, (1, 0)),
        ([errno.EACCES, errno.EADDRINUSE], 2, (0, 1)),
        ([errno.EPERM], 1, (0, 1)),
    ],
)
def test_a_source_that_cannot_be_had_is_the_node(
    listener: socket.socket,
    problems: list[int],
    bound: int,
    counters: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def bind(sock: socket.socket, source: tuple[str, int]) -> int:
        asked.append(source[1])
        return problems[len(asked) - 1]

    monkeypatch.setattr(transparent, "_bind", bind)
    made = Transparent()
    sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
    try:
        name = listener.getsockname()
        sock, problem = made.connect(sock, ("127.0.0.1", 4711), name)
        assert problem in (0, errno.EINPROGRESS)
        listener.accept()[0].close()
    finally:
        sock.close()
    assert asked == [4711, 0][:bound]
    assert made.by_name() == {"transparent": counters[0], "not_transparent": counters[1]}


def test_a_connection_that_is_there_already_takes_another_port(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """connect() says so, after bind() has let us have the port."""
    monkeypatch.setattr(transparent, "_IP_TRANSPARENT", 15)  # IP_FREEBIND: no privilege needed
    made = Transparent()
    name = listener.getsockname()
    with socket.create_connection(name) as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken = first.getsockname()
        sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
        try:
            sock, problem = made.connect(sock, taken, name)
            assert problem in (0, errno.EINPROGRESS)
            host, port = sock.getsockname()
            assert host == "127.0.0.1"
            assert port != taken[1]
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        finally:
            sock.close()
    assert made.by_name()["transparent"] == 1


def test_without_a_descriptor_for_another_attempt_the_socket_is_open(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is watched by its descriptor; of one that is closed this is -1, and somebody else's."""
    monkeypatch.setattr(transparent, "_IP_TRANSPARENT", 15)  # IP_FREEBIND: no privilege needed
    made = Transparent()
    name = listener.getsockname()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_connection(name) as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
        # Whatever others give back meanwhile: no number is below the limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            same, problem = made.connect(sock, first.getsockname(), name)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (same, problem) == (sock, errno.EMFILE)
        assert sock.fileno() >= 0
        sock.close()


class Everyone:
    """A place that shows everybody."""

    def shows(self, client: str, endpoint: Endpoint) -> bool:
        return True


def test_the_node_and_what_it_cannot_reach_are_not_due() -> None:
    made = Transparent()
    try:
        for client in ("127.0.0.1", "::1"):
            assert not made.is_due(Everyone(), client, Endpoint(parse_address(client), 80))
    finally:
        made.close()


def test_a_setting_of_any_interface_counts(tmp_path: Path) -> None:
    for name, value in (("all", "0"), ("default", "1"), ("wg0", "1"), ("eth0", "0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "src_valid_mark").write_text(f"{value}\n")
    assert wrong_settings(tmp_path) == ["net.ipv4.conf.wg0.src_valid_mark"]


def test_an_interface_that_goes_meanwhile_has_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone", "wg0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "src_valid_mark").write_text("1\n")
    read = Path.read_text

    def going(self: Path) -> str:
        (tmp_path / "gone" / "src_valid_mark").unlink(missing_ok=True)
        return read(self)

    monkeypatch.setattr(Path, "read_text", going)
    assert wrong_settings(tmp_path) == ["net.ipv4.conf.wg0.src_valid_mark"]


@pytest.mark.parametrize(
    ("family", "code", "is_nothing"),
    [
        (Family.IPV4, errno.ENOENT, True),
        (Family.IPV6, errno.ENOENT, True),
        (Family.IPV6, errno.EAFNOSUPPORT, True),
        (Family.IPV4, errno.EAFNOSUPPORT, False),
        (Family.IPV4, errno.ENOBUFS, False),
        (Family.IPV6, errno.ENOBUFS, False),
        (Family.IPV6, errno.EPERM, False),
    ],
    ids=str,
)
def test_a_listing_that_failed_is_not_taken_for_an_empty_one(
    family: Family, code: int, is_nothing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Netlink, number: int) -> list[bytes]:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Netlink, "_listing", refused)
    if is_nothing:
        assert policy_routing._routing_of(family) == ([], False)
    else:
        with pytest.raises(DataplaneError):
            policy_routing._routing_of(family)


def test_a_worker_of_before_tells_that_it_is_not_transparent() -> None:
    old = ["Told", "1", 7, 0, False, [[], [], ""], []]
    told = answer_of(encode(old))
    assert not getattr(told, "transparent", None)


@pytest.mark.parametrize("family", Family, ids=str)
def test_messages_are_those_that_pyroute2_encodes(family: Family) -> None:
    rule = fibmsg()
    rule["header"]["type"] = 32
    rule["family"], rule["table"], rule["action"] = ADDRESS_FAMILY[family], 119, 1
    rule["attrs"] = [
        ("FRA_PRIORITY", 90),
        ("FRA_FWMARK", 4096),
        ("FRA_FWMASK", 4096),
        ("FRA_PROTOCOL", 119),
    ]
    rule.encode()
    made = policy_routing._rule_body(family, policy_routing._Rule(4096, 4096, 90))
    assert made == bytes(rule.data)[HEADER.size :]
    route = rtmsg()
    route["family"], route["table"], route["proto"] = ADDRESS_FAMILY[family], 119, 119
    route["type"], route["scope"] = 2, 254 if family is Family.IPV4 else 0
    route["attrs"] = [("RTA_OIF", 1)]
    route.encode()
    assert policy_routing._route_body(family) == bytes(route.data)[HEADER.size :]
