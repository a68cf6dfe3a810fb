"""What a forwarded stream or datagram keeps of a direct one: ends, resets, back-pressure, sources.

The test itself is both the client and the endpoint; between them are the node's rules, a worker and
its kernel.
"""

import contextlib
import os
import select
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.netns.cluster import (
    LOCAL,
    NFT,
    SILENCE_SECONDS,
    TCP4,
    TCP6,
    UDP4,
    UDP6,
    Cluster,
    Flavour,
    Served,
    held,
    until,
)
from tests.netns.ends import PORT, Ends, at_once, exactly, receive, reset, send
from tests.netns.processes import is_stopped, resident_bytes, workers
from tests.netns.streams import Arrived, piece

from vipd.proxy.names import Address

pytestmark = [pytest.mark.netns, pytest.mark.essential, pytest.mark.modes("userspace")]

POD, OTHER = "web-1", "web-4"
LONG = 6 << 20
"""Bytes, to one whose buffer is SMALL: a worker has to hold some, and to write it in parts."""
SMALL = 1 << 16


@pytest.fixture
def ends(cluster: Cluster) -> Iterator[Ends]:
    with Ends(cluster) as made:
        yield made


tcp = pytest.mark.parametrize("over", [TCP4, TCP6], ids=str)
udp = pytest.mark.parametrize("over", [UDP4, UDP6], ids=str)
"""Not called `flavour`: these are quick enough to be run with every one (modes.py)."""


# TCP: the end of one direction is not that of the other


@tcp
def test_a_client_that_has_ended_reads_a_long_reply(ends: Ends, over: Flavour) -> None:
    listener = ends.endpoint(POD, over)
    client = ends.connected(ends.serve(over, POD), SO_RCVBUF=SMALL)
    send(client, 1, "request", SMALL)
    client.shutdown(socket.SHUT_WR)
    endpoint = ends.accepted(listener)
    assert receive(endpoint, 1, "request", SMALL).is_whole

    def reply() -> None:
        send(endpoint, 1, "reply", LONG)
        endpoint.close()

    _, arrived = at_once(reply, lambda: receive(client, 1, "reply", LONG))
    assert arrived.is_whole


@tcp
def test_an_endpoint_that_has_ended_hears_a_long_request(ends: Ends, over: Flavour) -> None:
    listener = ends.endpoint(POD, over, SO_RCVBUF=SMALL)
    client = ends.connected(ends.serve(over, POD))
    endpoint = ends.accepted(listener)
    send(endpoint, 2, "reply", SMALL)
    endpoint.shutdown(socket.SHUT_WR)
    assert receive(client, 2, "reply", SMALL).is_whole

    def ask() -> None:
        send(client, 2, "request", LONG)
        client.close()

    _, arrived = at_once(ask, lambda: receive(endpoint, 2, "request", LONG))
    assert arrived.is_whole


# TCP: who does not read stops who sends


STALLED = 4
OFFERED = 16 << 20
"""Bytes that the sender of each stalled connection would like to send."""
MOST_STALLED = 4 << 20
"""What may be under way of one: the kernel's buffers of four sockets, and one read of a worker."""
MORE = 1 << 20
"""Bytes that are sent when the other side reads again."""
MOST_GROWTH = STALLED * (1 << 19)
"""Of all workers together, in memory."""
KERNEL_BUFFERS = {
    "ipv4/tcp_rmem": f"4096 131072 {16 * SMALL}",
    "ipv4/tcp_wmem": f"4096 16384 {SMALL}",
}
"""A worker can read more at once than it can write at once."""


@pytest.fixture
def small_buffers(cluster: Cluster) -> Iterator[None]:
    """Let the kernel of the node hold little; by default it may be 36 MiB for a connection."""
    paths = [Path("/proc/sys/net", one) for one in KERNEL_BUFFERS]
    before = cluster.lab.run("node", lambda: [one.read_text() for one in paths])

    def write(texts: list[str]) -> None:
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)

    cluster.lab.run("node", lambda: write([*KERNEL_BUFFERS.values()]))
    yield
    cluster.lab.run("node", lambda: write(before))


def stall(sender: socket.socket, number: int) -> int:
    """Send until nothing more is taken; return how much was."""
    sent = 0
    while sent < OFFERED and select.select([], [sender], [], SILENCE_SECONDS)[1]:
        with contextlib.suppress(BlockingIOError):
            data = piece(number, "reply", sent, min(SMALL, OFFERED - sent))
            sent += sender.send(data, socket.MSG_DONTWAIT)
    return sent


@pytest.mark.parametrize("towards", ["client", "endpoint"])
def test_who_does_not_read_stalls_the_sender_and_costs_the_worker_nothing(
    ends: Ends, cluster: Cluster, small_buffers: None, towards: str
) -> None:
    listener = ends.endpoint(POD, TCP4, SO_RCVBUF=SMALL, SO_SNDBUF=SMALL)
    served = ends.serve(TCP4, POD)
    pairs = []
    for _ in range(STALLED):
        client = ends.connected(served, SO_RCVBUF=SMALL, SO_SNDBUF=SMALL)
        pair = (ends.accepted(listener), client)
        pairs.append(pair if towards == "client" else pair[::-1])
    there = workers(cluster)
    before = sum(map(resident_bytes, there))
    stalled = [stall(sender, number) for number, (sender, _) in enumerate(pairs)]
    grown = sum(map(resident_bytes, there)) - before
    assert all(SMALL < one < MOST_STALLED for one in stalled), stalled
    assert grown < MOST_GROWTH
    assert cluster.serve(TCP4, LOCAL).ask("client-1").pod == LOCAL

    for number, (sender, receiver) in enumerate(pairs):
        size = stalled[number] + MORE

        def finish(sender: socket.socket = sender, number: int = number, size: int = size) -> None:
            send(sender, number, "reply", size, first=stalled[number])
            sender.shutdown(socket.SHUT_WR)

        def read(
            receiver: socket.socket = receiver, number: int = number, size: int = size
        ) -> Arrived:
            return receive(receiver, number, "reply", size)

        _, arrived = at_once(finish, read)
        assert arrived.is_whole
    assert sum(map(resident_bytes, there)) - before < MOST_GROWTH


# TCP: a reset is no end


@tcp
def test_an_endpoint_that_accepts_and_resets_resets_the_client(ends: Ends, over: Flavour) -> None:
    listener = ends.endpoint(POD, over)
    client = ends.connected(ends.serve(over, POD))
    reset(ends.accepted(listener))
    with pytest.raises(ConnectionResetError):
        exactly(client, 1)


@contextlib.contextmanager
def standing_still(cluster: Cluster) -> Iterator[None]:
    """Let workers meet what happens inside at once, in the order of its arrival."""
    there = workers(cluster)
    for one in there:
        os.kill(one, signal.SIGSTOP)
    try:
        until(lambda: all(map(is_stopped, there)), "workers stand still")
        yield
    finally:
        for one in there:
            os.kill(one, signal.SIGCONT)


@pytest.mark.parametrize("who", ["client", "endpoint"])
@pytest.mark.parametrize(
    ("last", "unheard"),
    [
        pytest.param(0, 0, id="silently"),
        pytest.param(100, 0, id="with-last-words"),
        pytest.param(0, 100, id="spoken-to"),
        pytest.param(100, 100, id="spoken-to-with-last-words"),
    ],
)
def test_a_reset_in_the_midst_is_passed_on(
    ends: Ends, cluster: Cluster, who: str, last: int, unheard: int
) -> None:
    listener = ends.endpoint(POD, TCP4)
    client = ends.connected(ends.serve(TCP4, POD))
    endpoint = ends.accepted(listener)
    breaking, other = (client, endpoint) if who == "client" else (endpoint, client)
    send(breaking, 3, "reply", 100)
    assert exactly(other, 100) == piece(3, "reply", 0, 100)
    with standing_still(cluster):
        other.sendall(bytes(unheard))
        breaking.sendall(bytes(last))
        reset(breaking)
    assert exactly(other, last) == bytes(last)
    with pytest.raises(ConnectionResetError):
        exactly(other, 1)


# TCP: which endpoint


def resets_sent(cluster: Cluster, pod: str) -> int:
    """Resets that a pod has sent since it was made (RFC 2012, tcpOutRsts)."""
    text = cluster.lab.run(pod, Path("/proc/thread-self/net/snmp").read_text)
    names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
    return int(values[names.index("OutRsts")])


def request_and_reply(ends: Ends, served: Served, listener: socket.socket, number: int) -> None:
    """One connection: what the client says at once arrives, and the answer does."""
    client = ends.connected(served)
    send(client, number, "request", 1000)
    endpoint = ends.accepted(listener)
    assert exactly(endpoint, 1000) == piece(number, "request", 0, 1000)
    send(endpoint, number, "reply", 1000)
    endpoint.close()
    assert receive(client, number, "reply", 1000).is_whole
    client.close()


@tcp
def test_an_endpoint_that_refuses_is_passed_over_and_no_client_notices(
    ends: Ends, cluster: Cluster, over: Flavour
) -> None:
    listener = ends.endpoint(POD, over)
    served = ends.serve(over, POD, OTHER)
    before = resets_sent(cluster, OTHER)
    for number in range(30):
        request_and_reply(ends, served, listener, number)
    assert resets_sent(cluster, OTHER) > before


def test_an_endpoint_that_is_silent_is_passed_over(ends: Ends, cluster: Cluster) -> None:
    rules = (
        f"table inet silent {{ counter silenced {{ }}; chain input {{ type filter hook input "
        f"priority 0; tcp dport {PORT} counter name silenced drop; }}; }}"
    )
    cluster.lab.exec(OTHER, [NFT, "-f", "-"], input=rules, check=True)
    try:
        listener = ends.endpoint(POD, TCP4)
        served = ends.serve(TCP4, POD, OTHER)
        for number in range(10):
            request_and_reply(ends, served, listener, number)
        told = cluster.lab.exec(OTHER, [NFT, "list", "counters"], check=True).stdout
        assert "packets 0" not in told
    finally:
        cluster.lab.exec(OTHER, [NFT, "delete", "table", "inet", "silent"], check=True)


@tcp
def test_where_every_endpoint_refuses_the_client_is_reset(ends: Ends, over: Flavour) -> None:
    served = ends.serve(over, POD, OTHER)
    for _ in range(10):
        with pytest.raises((ConnectionRefusedError, ConnectionResetError)):
            exactly(ends.connected(served), 1)


def test_as_endpoints_come_and_go_clients_are_served_or_refused(
    ends: Ends, cluster: Cluster
) -> None:
    served = cluster.serve(TCP4, LOCAL)
    met: dict[str, Counter[str]] = {one: Counter() for one in ("changes", "some", "none")}
    state = "some"

    def outcome() -> str:
        with ends.made("client-1", TCP4) as client:
            try:
                client.connect((str(served.address), 80))
            except ConnectionRefusedError:
                return "refused"
            try:
                client.sendall(b"close\n")
                return "served" if exactly(client, 4) == b"web-" else "accepted, then ended"
            except OSError as error:
                return f"accepted, then {error.strerror}"

    def ask() -> None:
        while state != "over":
            before = state
            what = outcome()
            met[before if before == state else "changes"][what] += 1

    def change() -> None:
        nonlocal state
        try:
            for pods in [(), (LOCAL,)] * 10:
                state = "changes"
                served.endpoints(*pods)
                state = "some" if pods else "none"
                before = met[state].total()
                until(lambda: met[state].total() > before + 5, "clients come")  # noqa: B023
        finally:
            state = "over"

    with held(cluster, "client-1", served.address) as connection:
        assert connection.who() == LOCAL
        at_once(ask, change)
        assert connection.who() == LOCAL
    assert set(met["changes"]) <= {"served", "refused"}, met
    assert set(met["some"]) == {"served"}, met
    assert set(met["none"]) == {"refused"}, met


# UDP


@udp
def test_large_datagrams_are_whole_both_ways(ends: Ends, over: Flavour) -> None:
    endpoint = ends.endpoint(POD, over)
    client = ends.connected(ends.serve(over, POD))
    for number in range(3):
        question, answer = piece(number, "request", 0, 60_000), piece(number, "reply", 0, 60_000)
        client.send(question)
        data, source = endpoint.recvfrom(65_536)
        assert data == question
        endpoint.sendto(answer, source)
        assert client.recv(65_536) == answer


@udp
def test_replies_come_from_the_address_that_was_asked(
    ends: Ends, cluster: Cluster, over: Flavour
) -> None:
    served = cluster.serve(over, LOCAL, type="NodePort")
    served.change(externalIPs=[str(served.outside_address)])
    asked: list[tuple[Address, int]] = [served.on_node(), (served.outside_address, 80)]
    client = ends.made("outside", over)
    for address, port in asked * 2:  # one port of the client: as many sessions as addresses
        client.sendto(b"who", (str(address), port))
        data, source = client.recvfrom(2048)
        assert data.startswith(LOCAL.encode())
        assert source[:2] == (str(address), port)
    inner = ends.made("client-1", over)
    inner.sendto(b"who", (str(served.address), 80))
    assert inner.recvfrom(2048)[1][:2] == (str(served.address), 80)


@udp
def test_a_session_whose_endpoint_is_gone_goes_on_with_another(ends: Ends, over: Flavour) -> None:
    sockets = {pod: ends.endpoint(pod, over) for pod in (POD, OTHER)}
    client = ends.connected(ends.serve(over, POD, OTHER))

    def asked(text: bytes) -> str:
        """Who gets it, and answers; nobody: an empty text."""
        client.send(text)
        ready, _, _ = select.select(list(sockets.values()), [], [], SILENCE_SECONDS)
        for pod, one in sockets.items():
            if one in ready:
                data, source = one.recvfrom(2048)
                assert data == text
                one.sendto(pod.encode(), source)
                assert client.recv(2048) == pod.encode()
                return pod
        return ""

    first = asked(b"1")
    assert asked(b"2") == first
    sockets.pop(first).close()
    assert asked(b"lost with the endpoint") == ""
    (other,) = sockets
    assert [asked(b"3"), asked(b"4")] == [other, other]
