"""Connection tracking on the real kernel, in a network namespace of its own."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import ip_address
from socket import AF_INET, AF_INET6
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from vipd.backends import conntrack, conntrack_messages
from vipd.backends.protocol import Departed
from vipd.bench import lab_netns
from vipd.bench.lab import obstacle
from vipd.proxy.errors import Unsupported
from vipd.proxy.names import Family, Protocol
from vipd.proxy.virtualserver import Key

MARK, MASK = 0x4E000000, 0xFF000000
SEEN_REPLY, ASSURED, CONFIRMED = 1 << 1, 1 << 2, 1 << 3
ESTABLISHED, TIME_WAIT, CLOSE = 3, 7, 8
NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}
UDP, SCTP = Protocol.UDP, Protocol.SCTP
SPOT, SPOT6 = (ip_address("10.2.0.1"), 53), (ip_address("fd00:2::1"), 53)
T = TypeVar("T")
Inside = Callable[[Callable[[], T]], T]


@pytest.fixture
def inside() -> Iterator[Inside[Any]]:
    """Return what runs a function in a network namespace that is new."""
    if (reason := obstacle()) is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    path = lab_netns.DIRECTORY / f"vt-ct-{os.getpid()}"
    path.parent.mkdir(exist_ok=True)
    lab_netns.create(path, lambda: None)
    yield lambda call: lab_netns.inside(path, call)
    lab_netns.delete(path)


@pytest.fixture(params=["filters", "does not filter"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that filters by tuple and state, and one that is too old for it (5.8, 5.15)."""
    if request.param != "filters":
        dump = conntrack_messages.dump
        monkeypatch.setattr(conntrack_messages, "dump", lambda family, wanted: dump(family, b""))


def waited(made: Callable[[], Awaitable[T]]) -> Callable[[], T]:
    async def run() -> T:
        return await made()

    return lambda: asyncio.run(run())


def tracked(
    to: str,
    answering: str,
    *,
    protocol: Protocol = Protocol.TCP,
    client: int = 40000,
    status: int = SEEN_REPLY | ASSURED,
    mark: int = MARK,
    state: int = ESTABLISHED,
) -> Callable[[], None]:
    """Return what makes an entry: a client's flow to ADDRESS PORT, answered by ADDRESS PORT."""

    def make() -> None:
        from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

        (far, port), (endpoint, its_port) = to.split(), answering.split()
        number = NUMBERS[protocol]
        family = AF_INET6 if ":" in far else AF_INET
        source = "fd00::99" if family == AF_INET6 else "10.1.2.3"
        state_of = {
            "attrs": [["CTA_PROTOINFO_TCP", {"attrs": [["CTA_PROTOINFO_TCP_STATE", state]]}]]
        }
        tcp = {"protoinfo": state_of} if protocol is Protocol.TCP else {}
        with NFCTSocket(family) as sockets:
            sockets.entry(
                "add",
                timeout=300,
                mark=mark,
                status=status | CONFIRMED,
                tuple_orig=_tuple(NFCTAttrTuple, family, number, source, far, client, int(port)),
                tuple_reply=_tuple(
                    NFCTAttrTuple, family, number, endpoint, source, int(its_port), client
                ),
                **tcp,
            )

    return make


def _tuple(
    kind: Any, family: int, number: int, source: str, far: str, sport: int, dport: int
) -> Any:
    return kind(family=family, proto=number, saddr=source, daddr=far, sport=sport, dport=dport)


def clients() -> set[int]:
    """Return the source port of each entry there is, as pyroute2 reads the table."""
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

    found: set[int] = set()
    for family in (AF_INET, AF_INET6):
        with NFCTSocket(family) as sockets:
            for entry in sockets.dump():
                ports = entry.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_PROTO")
                found.add(ports.get_attr("CTA_PROTO_SRC_PORT"))
    return found


def key(address: str | None, port: int, protocol: Protocol = Protocol.TCP) -> Key:
    if address is None:
        return Key(Family.IPV4, None, protocol, port)
    far = ip_address(address)
    return Key(Family(far.version), far, protocol, port)


def test_flows_are_those_of_the_mark_that_live(inside: Inside[Any]) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"state": TIME_WAIT},
        {"state": CLOSE},
        {"mark": 0x49000000},
        {"mark": 0},
        {"mark": MARK | 0x4000},
        {"protocol": Protocol.UDP},
        {"protocol": Protocol.UDP, "status": 0},
        {"protocol": Protocol.SCTP},
    ]
    for number, made in enumerate(kinds):
        inside(tracked("10.0.0.1 80", "10.2.0.1 8080", client=40000 + number, **made))
    inside(tracked("fd00::1 443", "fd00:2::1 8443"))
    found = inside(waited(lambda: conntrack.flows(MARK, MASK)))
    assert found.by_server == {
        "10.0.0.1:80/TCP": 2,
        "10.0.0.1:80/UDP": 2,
        "10.0.0.1:80/SCTP": 1,
        "[fd00::1]:443/TCP": 1,
    }
    assert found.total == 6


@pytest.mark.usefixtures("kernel")
def test_the_entries_are_those_of_one_source_and_virtual_server(inside: Inside[Any]) -> None:
    inside(tracked("10.0.0.1 80", "10.2.0.1 8080", client=1))
    inside(tracked("10.0.0.1 80", "10.2.0.2 8080", client=2, mark=0, state=TIME_WAIT, status=0))
    inside(tracked("10.0.0.1 81", "10.2.0.1 8080", client=3))
    inside(tracked("10.0.0.2 80", "10.2.0.1 8080", client=4))
    inside(tracked("10.0.0.1 80", "10.2.0.1 8080", client=5, protocol=Protocol.UDP))
    inside(tracked("fd00::1 80", "fd00:2::1 8080", client=6, protocol=Protocol.UDP))

    def entries(source: str, of: Key) -> list[conntrack.Flow]:
        found = inside(waited(lambda: conntrack.entries(ip_address(source), of)))
        assert all(290 < one.seconds <= 300 for one in found)
        return sorted((replace(one, seconds=0) for one in found), key=lambda one: one.client_port)

    assert entries("10.1.2.3", key("10.0.0.1", 80)) == [
        conntrack.Flow(1, "10.2.0.1:8080/TCP", True, ESTABLISHED, 0, MARK),
        conntrack.Flow(2, "10.2.0.2:8080/TCP", False, TIME_WAIT, 0, 0),
    ]
    assert entries("10.1.2.4", key("10.0.0.1", 80)) == []
    assert entries("fd00::99", key("fd00::1", 80, Protocol.UDP)) == [
        conntrack.Flow(6, "[fd00:2::1]:8080/UDP", True, None, 0, MARK)
    ]


@pytest.mark.usefixtures("kernel")
def test_only_what_is_unanswered_and_untranslated_is_forgotten(inside: Inside[Any]) -> None:
    udp = Protocol.UDP
    stuck: dict[str, Any] = {"protocol": udp, "status": 0}
    inside(tracked("10.0.0.1 53", "10.0.0.1 53", client=1, **stuck))
    inside(tracked("10.0.0.1 53", "10.0.0.1 53", client=2, protocol=udp, status=SEEN_REPLY))
    inside(tracked("10.0.0.1 53", "10.2.0.1 53", client=3, **stuck))
    inside(tracked("10.0.0.1 54", "10.0.0.1 54", client=4, **stuck))
    inside(tracked("10.0.0.2 53", "10.0.0.2 53", client=5, **stuck))
    inside(tracked("10.0.0.1 53", "10.0.0.1 53", client=6, status=0))
    inside(tracked("192.0.2.1 30053", "192.0.2.1 30053", client=7, **stuck))
    inside(tracked("192.0.2.2 30053", "192.0.2.2 30053", client=8, **stuck))
    inside(tracked("fd00::1 53", "fd00::1 53", client=9, **stuck))
    keys = [key("10.0.0.1", 53, udp), key(None, 30053, udp), key("fd00::1", 53, udp)]
    own = [ip_address("192.0.2.1"), ip_address("2001:db8::1")]
    assert (
        inside(
            waited(
                lambda: conntrack.forget_stale(keys, lambda _: {(ip_address("10.2.0.1"), 53)}, own)
            )
        )
        == 3
    )
    assert inside(clients) == {2, 3, 4, 5, 6, 8}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("left", [None, {(ip_address("10.2.0.2"), 53)}], ids=["all", "one left"])
def test_what_is_translated_to_nobody_alive_is_forgotten(inside: Inside[Any], left: Any) -> None:
    made: list[tuple[str, str, Protocol, dict[str, Any]]] = [
        ("10.0.0.1 53", "10.2.0.2 53", UDP, {}),  # 1: gone
        ("10.0.0.1 53", "10.2.0.1 53", UDP, {}),
        ("10.0.0.1 53", "10.0.0.1 53", UDP, {}),  # not translated
        ("10.0.0.1 54", "10.2.0.2 53", UDP, {}),  # no virtual server
        ("10.0.0.2 53", "10.2.0.2 53", UDP, {}),
        ("10.0.0.1 53", "10.2.0.2 53", UDP, {"status": 0}),  # 6: gone
        ("192.0.2.1 30053", "10.2.0.2 53", UDP, {}),  # 7: gone
        ("192.0.2.2 30053", "10.2.0.2 53", UDP, {}),  # not the node's
        ("10.0.0.1 53", "10.2.0.2 53", SCTP, {}),  # 9: gone
        ("10.0.0.1 53", "10.2.0.1 53", SCTP, {}),
        ("10.0.0.1 53", "10.2.0.2 53", Protocol.TCP, {}),  # established
        ("10.0.0.1 53", "10.2.0.2 53", Protocol.TCP, {"status": 0, "state": 1}),  # 12: SYN_SENT
        ("10.0.0.1 53", "10.2.0.1 53", Protocol.TCP, {"status": 0, "state": 1}),
        ("10.0.0.1 53", "10.2.0.2 53", Protocol.TCP, {"status": 0, "state": 2}),  # SYN_RECV
        ("10.0.0.1 53", "10.2.0.2 54", UDP, {}),  # 15: gone, but nobody looks for it
    ]
    for client, (to, answering, protocol, more) in enumerate(made, start=1):
        inside(tracked(to, answering, protocol=protocol, client=client, **more))
    keys = [key("10.0.0.1", 53, one) for one in (UDP, SCTP, Protocol.TCP)]
    keys.append(key(None, 30053, UDP))
    own = [ip_address("192.0.2.1"), ip_address("2001:db8::1")]
    forgotten = inside(waited(lambda: conntrack.forget_stale(keys, lambda _: {SPOT}, own, left)))
    expected = {1, 6, 7, 9, 12}
    # That only those who left are looked for is the kernel's work, and no promise.
    also = {15} & (set(range(1, 16)) - inside(clients))
    assert forgotten == len(expected | also)
    assert inside(clients) == set(range(1, 16)) - expected - also
    assert left is not None or also


@pytest.mark.usefixtures("kernel")
def test_what_is_stale_of_both_families(inside: Inside[Any]) -> None:
    inside(tracked("fd00::1 53", "fd00:2::2 53", client=1, protocol=UDP))
    inside(tracked("fd00::1 53", "fd00:2::1 53", client=2, protocol=UDP))
    inside(tracked("fd00::2 53", "fd00:2::2 53", client=3, protocol=UDP))
    inside(tracked("10.0.0.1 53", "10.2.0.2 53", client=4, protocol=UDP))
    inside(tracked("10.0.0.1 53", "10.2.0.1 53", client=5, protocol=UDP))
    keys = [key("fd00::1", 53, UDP), key("10.0.0.1", 53, UDP)]
    left = [(ip_address("10.2.0.2"), 53), (ip_address("fd00:2::2"), 53)]
    alive = {SPOT, SPOT6}
    assert inside(waited(lambda: conntrack.forget_stale(keys, lambda _: alive, (), left))) == 2
    assert inside(clients) == {2, 3, 5}


@pytest.mark.usefixtures("kernel")
def test_a_cut_ends_the_flows_of_the_pair_alone(inside: Inside[Any]) -> None:
    inside(tracked("10.0.0.1 80", "10.2.0.1 8080", client=1))
    inside(tracked("10.0.0.1 80", "10.2.0.2 8080", client=2))
    inside(tracked("10.0.0.2 80", "10.2.0.1 8080", client=3))
    inside(tracked("10.0.0.1 80", "10.2.0.1 8081", client=4))
    inside(tracked("10.0.0.1 80", "10.2.0.1 8080", client=5, protocol=Protocol.UDP))
    inside(tracked("10.0.0.1 80", "10.2.0.1 8080", client=6, mark=0))
    departed = [Departed(key("10.0.0.1", 80), ip_address("10.2.0.1"), 8080)]
    assert inside(waited(lambda: conntrack.cut(departed))) == 2
    assert inside(clients) == {2, 3, 4, 5}


@pytest.mark.usefixtures("kernel")
def test_a_cut_of_several_virtual_servers_and_of_both_families(inside: Inside[Any]) -> None:
    inside(tracked("10.0.0.1 80", "10.2.0.1 8080", client=1))
    inside(tracked("10.0.0.2 443", "10.2.0.1 8080", client=2))
    inside(tracked("192.0.2.1 30080", "10.2.0.1 8080", client=3))
    inside(tracked("192.0.2.7 30080", "10.2.0.1 8080", client=4))
    inside(tracked("fd00::1 80", "fd00:2::1 8080", client=5))
    inside(tracked("fd00::1 80", "fd00:2::2 8080", client=6))
    left = ip_address("10.2.0.1")
    departed = [
        Departed(key("10.0.0.1", 80), left, 8080),
        Departed(key(None, 30080), left, 8080),
        Departed(key("fd00::1", 80), ip_address("fd00:2::1"), 8080),
    ]
    assert inside(waited(lambda: conntrack.cut(departed))) == 4
    assert inside(clients) == {2, 6}


@pytest.mark.usefixtures("kernel")
def test_a_cut_of_one_ipv6_address(inside: Inside[Any]) -> None:
    inside(tracked("fd00::1 80", "fd00:2::1 8080", client=1))
    inside(tracked("fd00::2 80", "fd00:2::1 8080", client=2))
    departed = [Departed(key("fd00::1", 80), ip_address("fd00:2::1"), 8080)]
    assert inside(waited(lambda: conntrack.cut(departed))) == 1
    assert inside(clients) == {2}


def test_more_than_one_message_can_hold(inside: Inside[Any]) -> None:
    count = 2 * conntrack_messages.AT_ONCE + 1

    def make() -> None:
        for number in range(count):
            tracked("10.0.0.1 80", "10.2.0.1 8080", client=1000 + number)()

    inside(make)
    departed = [Departed(key("10.0.0.1", 80), ip_address("10.2.0.1"), 8080)]
    assert inside(waited(lambda: conntrack.flows(MARK, MASK))).total == count
    assert inside(waited(lambda: conntrack.cut(departed))) == count
    assert inside(clients) == set()


def test_without_the_right_to_it_is_said_what_is_needed(inside: Inside[Any]) -> None:
    def unprivileged() -> None:
        # The thread is this test's own, and its capabilities go with it.
        import ctypes

        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        nothing = (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, nothing) == 0
        asyncio.run(cut_nothing())

    async def cut_nothing() -> None:
        await conntrack.flows(MARK, MASK)

    with pytest.raises(Unsupported, match="CAP_NET_ADMIN"):
        inside(unprivileged)


def test_without_keys_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conntrack_messages, "_netlink", None)
    assert asyncio.run(conntrack.forget_stale([], lambda _: ())) == 0
    assert asyncio.run(conntrack.forget_stale([key(None, 30080)], lambda _: ())) == 0
    assert asyncio.run(conntrack.cut([])) == 0


def test_a_kernel_without_the_module_is_said_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(conntrack_messages, "_netlink", refuse)
    with pytest.raises(Unsupported, match="modprobe nf_conntrack_netlink"):
        asyncio.run(conntrack.flows(MARK, MASK))
