"""What meets a bound in userspace mode, and kills nobody: floods, workers without descriptors."""

import contextlib
import itertools
import os
import resource
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.netns.cluster import (
    DEADLINE_SECONDS,
    LOCAL,
    REMOTE,
    TCP4,
    UDP4,
    Cluster,
    Served,
    until,
)
from tests.netns.processes import (
    bound_descriptors,
    descriptors_at_most,
    is_stopped,
    listening,
    sockets,
    workers,
)

from vipd.backends.userspace.forwarder.udp_sessions import UdpLimits

pytestmark = [pytest.mark.netns, pytest.mark.essential, pytest.mark.modes("userspace")]

NewCluster = Callable[..., Cluster]

WORKERS = 2
"""On any machine: few workers meet their bounds sooner."""


@pytest.fixture
def cluster(new_cluster: NewCluster, tmp_path: Path) -> Cluster:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\nuserspace: {{workers: {WORKERS}}}\n"
    )
    built = new_cluster("--config", str(config))
    built.start()
    return built


# Sessions of UDP

BOUND = UdpLimits().most_of_client
"""Of one worker; fewer where it has few descriptors."""
FLOOD = round(1.5 * WORKERS * BOUND)
BYSTANDERS = 20
AT_ONCE = 512
OTHERS = 64
"""Sockets of a worker that are no sessions: its listeners and its control socket, and sessions that
are just being closed."""


def asked(cluster: Cluster, host: str, served: Served, count: int) -> list[socket.socket]:
    """So many UDP clients that have asked; the answers are still to be read."""
    made = cluster.lab.run(
        host, lambda: [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    )
    for one in made:
        one.settimeout(DEADLINE_SECONDS)
        one.connect((str(served.address), 80))
        one.send(b"who")
    return made


def session(client: socket.socket) -> str:
    """The answer: the pod, and the address and port that it saw, which are one session's own."""
    return client.recv(2048).decode().strip()


def test_a_flood_of_udp_sources_meets_its_bound_and_harms_nobody_else(cluster: Cluster) -> None:
    served = cluster.serve(UDP4, LOCAL)
    there = workers(cluster)
    bystanders = asked(cluster, "client-2", served, BYSTANDERS)
    with contextlib.ExitStack() as stack:
        for one in bystanders:
            stack.enter_context(one)
        before = [session(one) for one in bystanders]
        most = 0
        for begun in range(0, FLOOD, AT_ONCE):
            for one in asked(cluster, "client-1", served, min(AT_ONCE, FLOOD - begun)):
                with one:
                    session(one)
            most = max(most, sum(sockets(one)["socket"] for one in there))
        assert most > AT_ONCE, "the flood was none"
        until(
            lambda: all(sockets(one)["socket"] < BOUND + OTHERS for one in there), "it is bounded"
        )
        for one in bystanders:
            one.send(b"who")
        assert [session(one) for one in bystanders] == before
        for host in ("client-1", "client-2"):
            (new,) = asked(cluster, host, served, 1)
            with new:
                assert session(new).startswith(LOCAL)
    assert workers(cluster) == there


# Descriptors

PAUSED = "accept is paused"
UNANSWERED = "the daemon is not answered"


def told(cluster: Cluster, text: str) -> int:
    """How often workers said something in the log."""
    return cluster.daemon.log.read_text().count(text)


class Clients:
    """TCP connections that have asked who serves them, and have their answer or wait for it."""

    def __init__(
        self, cluster: Cluster, served: Served, count: int, sources: Sequence[str] = ("",)
    ) -> None:
        made = cluster.lab.run(
            "client-1", lambda: [socket.socket(socket.AF_INET) for _ in range(count)]
        )
        self.waiting = made
        self.answered: list[socket.socket] = []
        self.broken: list[str] = []
        for one, source in zip(made, itertools.cycle(sources)):
            one.settimeout(DEADLINE_SECONDS)
            one.bind((source, 0))
            one.connect((str(served.address), 80))  # the kernel sees to that
            one.sendall(b"who\n")

    def look(self) -> int:
        """Take note of who has an answer by now; return how many wait still."""
        poll = select.poll()
        for one in self.waiting:
            poll.register(one, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(0)}
        for one in [one for one in self.waiting if one.fileno() in ready]:
            self.waiting.remove(one)
            why = "ended"
            with contextlib.suppress(ConnectionError):
                if one.recv(2048).startswith(b"web-"):
                    self.answered.append(one)
                    continue
                why = "reset"
            self.broken.append(why)
            one.close()
        return len(self.waiting)

    def leave(self) -> None:
        """Close those that have their answer."""
        some, self.answered = self.answered, []
        for one in some:
            one.close()

    def close(self) -> None:
        for one in [*self.waiting, *self.answered]:
            one.close()


@pytest.fixture
def ask(cluster: Cluster) -> Iterator[Callable[..., Clients]]:
    with contextlib.ExitStack() as stack:

        def begin(served: Served, count: int, sources: Sequence[str] = ("",)) -> Clients:
            made = Clients(cluster, served, count, sources)
            stack.callback(made.close)
            return made

        yield begin


class Short:
    """Workers that have descriptors for a few connections more, until it is over."""

    ROOM = 10
    """Connections; each takes two descriptors."""
    MANY = 80
    """Connections that all workers together have no room for."""

    def __init__(self, processes: Iterable[int]) -> None:
        self._most = {one: descriptors_at_most(one) for one in processes}
        for one in self._most:
            highest = max(int(name) for name in os.listdir(f"/proc/{one}/fd"))
            bound_descriptors(one, highest + 1 + 2 * self.ROOM)

    def over(self) -> None:
        for one, most in self._most.items():
            bound_descriptors(one, most)


@pytest.fixture
def short(cluster: Cluster) -> Iterator[Callable[[], Short]]:
    made: list[Short] = []

    def begin() -> Short:
        made.append(Short(workers(cluster)))
        return made[-1]

    yield begin
    for one in made:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # some have ended
            one.over()


Ask = Callable[..., Clients]
Shorten = Callable[[], Short]


def test_without_descriptors_accepting_pauses_and_goes_on(
    cluster: Cluster, short: Shorten, ask: Ask
) -> None:
    served = cluster.serve(TCP4, LOCAL)
    there = workers(cluster)
    shortage = short()
    clients = ask(served, Short.MANY)
    until(lambda: told(cluster, PAUSED) == WORKERS, "all pause")
    until(lambda: clients.look() and clients.answered, "some have their answer")
    for _ in range(2):
        assert len(clients.waiting) > Short.MANY // 4
        clients.leave()
        until(lambda: clients.look() and clients.answered, "others have their place")
    shortage.over()
    until(lambda: not clients.look(), "everybody has an answer")
    # Who got the last descriptor may have waited for too long for another (connect_seconds).
    assert len(clients.broken) <= WORKERS, clients.broken
    assert told(cluster, PAUSED) == WORKERS, "said once by each"
    assert workers(cluster) == there
    assert set(served.pods("client-1")) == {LOCAL}


def test_a_daemon_that_starts_while_no_worker_has_a_descriptor_waits_for_them(
    cluster: Cluster, short: Shorten, ask: Ask
) -> None:
    served = cluster.serve(TCP4, LOCAL)
    there = workers(cluster)
    cluster.stop()
    shortage = short()
    clients = ask(served, Short.MANY)
    until(lambda: told(cluster, PAUSED) == WORKERS, "all pause")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(cluster.start)
        until(lambda: told(cluster, UNANSWERED) > 0, "it asks in vain")
        shortage.over()
        starting.result()
    until(lambda: not clients.look(), "everybody has an answer")
    assert len(clients.broken) <= 3 * WORKERS, clients.broken
    served.endpoints(REMOTE)
    assert set(served.pods("client-1")) == {REMOTE}
    assert workers(cluster) == there


LOST, AGAIN = "lost on the way", "listens everywhere again"


def test_a_listener_that_is_lost_on_its_way_is_given_again(
    cluster: Cluster, short: Shorten, ask: Ask
) -> None:
    served = cluster.serve(TCP4, LOCAL)
    there = workers(cluster)
    shortage = short()
    clients = ask(served, Short.MANY)
    until(lambda: told(cluster, PAUSED) == WORKERS, "all pause")
    new = Served(cluster, TCP4, {})
    new._endpoints = [new.endpoint(LOCAL)]
    cluster.apply(new.slice(), new.manifest())
    until(lambda: told(cluster, LOST) == WORKERS, "said once of each")
    cluster.settled()
    assert (
        "cannot listen at 1 place yet" in cluster.cli("status", "--socket", cluster.socket).stdout
    )
    shortage.over()
    until(lambda: not clients.look(), "everybody has an answer")
    until(lambda: told(cluster, AGAIN) == WORKERS, "they listen")
    assert set(new.pods("client-1")) == {LOCAL}
    served.endpoints(REMOTE)
    assert set(served.pods("client-1")) == {REMOTE}
    assert workers(cluster) == there


def test_who_waits_to_be_accepted_by_a_worker_that_dies_is_served_by_another(
    cluster: Cluster, ask: Ask
) -> None:
    migrates = ["sysctl", "-n", "net.ipv4.tcp_migrate_req"]
    if cluster.lab.exec("node", migrates).returncode:
        pytest.skip("Linux before 5.14 resets them")
    served = cluster.serve(TCP4, LOCAL)
    dies = min(workers(cluster))
    os.kill(dies, signal.SIGSTOP)
    until(lambda: is_stopped(dies), "it accepts nobody")
    clients = ask(served, Short.MANY)
    until(lambda: clients.look() and len(clients.answered) > Short.MANY // 4, "others are served")
    os.kill(dies, signal.SIGKILL)
    until(lambda: not clients.look(), "everybody has an answer")
    assert clients.broken == []
    cluster.stop()
    cluster.cli("cleanup", "--mode", "userspace", "--socket", cluster.socket)
    assert cluster.lab.exec("node", migrates).stdout == "0\n", "as it was"


FEW = 240
"""Open files of a worker: its listeners, a reserve, and some fifty connections."""
CROWD = 400
"""Connections that all workers together have no room for."""


def replaced_with_few_descriptors(cluster: Cluster) -> set[int]:
    """Bound the daemon's open files, which its workers inherit; return the workers that have it."""
    resource.prlimit(cluster.status().pid, resource.RLIMIT_NOFILE, (FEW, FEW))
    old = workers(cluster)
    for one in old:
        os.kill(one, signal.SIGKILL)
    until(lambda: len(set(listening(cluster, 80)) - old) == WORKERS, "others listen")
    new = workers(cluster) - old
    if any(descriptors_at_most(one) > FEW for one in new):
        pytest.skip("workers may raise their limit here: they have CAP_SYS_RESOURCE")
    return new


@pytest.fixture
def many_sources(cluster: Cluster) -> Iterator[list[str]]:
    """Further addresses of client-1: one alone may have half of a worker's connections."""
    made = [f"10.244.1.{number}" for number in range(100, 108)]
    commands = [
        (host, ["ip", kind, "{verb}", f"{one}/32", "dev", device])
        for one in made
        for host, kind, device in (("client-1", "address", "eth0"), ("node", "route", "client-1"))
    ]
    for verb in ("add", "del"):
        for host, words in commands:
            done = cluster.lab.exec(host, [word.format(verb=verb) for word in words])
            assert done.returncode == 0, done.stderr
        if verb == "add":
            yield made


def test_workers_that_are_full_obey_the_daemon_and_break_nothing(
    cluster: Cluster, ask: Ask, many_sources: list[str]
) -> None:
    served = cluster.serve(TCP4, LOCAL)
    there = replaced_with_few_descriptors(cluster)
    clients = ask(served, CROWD, many_sources)
    until(lambda: told(cluster, PAUSED) == WORKERS, "all pause")
    until(lambda: clients.look() and clients.answered, "some have their answer")

    new = cluster.serve(TCP4, LOCAL)  # with a listener that is to be taken
    new.endpoints(REMOTE)
    served.endpoints(REMOTE)
    assert len(clients.waiting) > CROWD // 4
    assert {*listening(cluster, 80)} == there
    cluster.stop()
    cluster.start()  # with its own limit, which is higher: so others take over who waits
    assert len({*listening(cluster, 80)}) == WORKERS
    assert not {*listening(cluster, 80)} & there

    def all_were_served() -> bool:
        clients.leave()  # which makes room for others
        return not clients.look()

    until(all_were_served, "everybody has an answer")
    assert clients.broken == []
    clients.leave()
    until(lambda: len(workers(cluster)) == WORKERS, "the old ones have ended")
    for one in (served, new):
        assert set(one.pods("client-1")) == {REMOTE}
