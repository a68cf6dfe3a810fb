"""What others do not lose when endpoints, workers and daemons are killed or replaced.

Two thousand connections are open at once, each with a stream of its own in both directions, of
which every byte is known (streams.py). Which worker holds which of them is read off the kernel
while that worker is stopped, so that it is known for certain whom its end may touch.
"""

import asyncio
import contextlib
import os
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from tests.netns import streams
from tests.netns.cluster import (
    DEADLINE_SECONDS,
    LOCAL,
    REMOTE,
    TCP4,
    UDP4,
    UDP6,
    Cluster,
    Flavour,
    held,
    until,
)
from tests.netns.crowds import PODS, Crowd, Endpoints, dual_stack, known
from tests.netns.ends import Ends
from tests.netns.processes import clients, end, is_stopped, listening, workers
from tests.netns.stream_client import Talk

from vipd.bench import switch_cluster
from vipd.bench.load import Load
from vipd.bench.load_work import Kind, Report

pytestmark = [pytest.mark.netns, pytest.mark.essential, pytest.mark.modes("userspace")]

SEED = 20
MANY = 2000
NEWCOMERS = 40
HANG_SECONDS = 15 * DEADLINE_SECONDS
"""No measure of anything: a test that hangs is to end."""
WORKERS = 2
"""On any machine: so few that NEWCOMERS meet each of them."""

NewCluster = Callable[..., Cluster]


@pytest.fixture
def cluster(new_cluster: NewCluster, tmp_path: Path) -> Iterator[Cluster]:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\nuserspace: {{workers: {WORKERS}}}\n"
    )
    built = new_cluster("--config", str(config))
    built.start()
    yield built
    built.stop()
    for one in workers(built):  # one that hangs would meet the next test
        os.kill(one, signal.SIGKILL)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Let this process have as many as it may: each connection is one."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


@pytest.fixture
def endpoints(cluster: Cluster, tmp_path: Path) -> Iterator[Endpoints]:
    folder = tmp_path / "endpoints"
    folder.mkdir()
    made = Endpoints(cluster, folder)
    try:
        for pod in PODS:
            made.start(pod)
        yield made
    finally:
        made.close()


async def test_two_thousand_streams_with_kills_lose_only_what_the_killed_had(
    cluster: Cluster, endpoints: Endpoints, many_descriptors: None
) -> None:
    dual_stack(cluster)
    lots = random.Random(SEED)
    first, second = lots.sample(PODS, 2)
    crowd = Crowd(cluster)
    before = workers(cluster)
    killed = lots.choice(sorted(before))
    async with asyncio.timeout(HANG_SECONDS):
        go, last = asyncio.Event(), asyncio.Event()
        there = await crowd.greet(MANY, go, last)
        held = clients(cluster, 80)
        assert sum(len(held[one]) for one in before) == MANY
        assert {one.pod for one in there} == set(PODS)
        assert known(one for one in there if one.ended) == []
        go.set()

        await crowd.has_arrived(0.25)
        endpoints.kill(first)
        newcomers = await crowd.greet(NEWCOMERS, go, last)
        assert first not in {one.pod for one in newcomers}

        await crowd.has_arrived(0.45)
        os.kill(killed, signal.SIGSTOP)
        until(lambda: is_stopped(killed), "it stands still")
        excused = clients(cluster, 80)[killed]
        end(killed)
        await crowd.greet(NEWCOMERS, go, last)

        await crowd.has_arrived(0.65)
        endpoints.kill(second)
        await crowd.greet(NEWCOMERS, go, last)
        last.set()
        await crowd.ended()

    lost = crowd.lost()
    assert known(one for one in lost if one.ended.startswith("wrong")) == []
    assert endpoints.said(streams.WRONG) == {}
    killed_pods = {first, second}
    harmed = [one for one in lost if one.pod not in killed_pods and one.name not in excused]
    assert known(harmed) == []
    # Everyone who could lose something was there, and most of the others had nothing to fear.
    by_cause = Counter(one.pod if one.pod in killed_pods else "worker" for one in lost)
    assert set(by_cause) == {first, second, "worker"}
    assert len(lost) < len(crowd.talks) - MANY // 8
    numbers = {one.number for one in lost if one.name in excused}
    assert set(endpoints.said(streams.SHORT)) <= numbers

    until(lambda: len(listening(cluster, 80)) == len(before), "another worker listens")
    assert workers(cluster) & before == before - {killed}
    for pod in (first, second):
        endpoints.start(pod)
    afterwards = Crowd(cluster)
    async with asyncio.timeout(HANG_SECONDS):
        go = asyncio.Event()
        while {one.pod for one in afterwards.talks} != set(PODS):  # they come back by trial
            await afterwards.greet(NEWCOMERS, go)
            await asyncio.sleep(0.1)
        assert served_by(cluster, afterwards.talks) == workers(cluster)
        go.set()
        await afterwards.ended()
    assert known(afterwards.lost()) == []


def served_by(cluster: Cluster, talks: Iterable[Talk]) -> set[int]:
    """The workers that hold these connections."""
    held = clients(cluster, 80)
    names = {one.name for one in talks}
    assert names <= set().union(*held.values())
    return {worker for worker, some in held.items() if some & names}


def test_connections_and_workers_outlive_the_daemon(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    there = workers(cluster)
    with held(cluster, "client-1", served.address) as connection:
        for end in (cluster.stop, cluster.kill):
            end()
            assert connection.who() == LOCAL
            assert served.ask("client-1").pod == LOCAL
            cluster.start()
            assert connection.who() == LOCAL
            assert workers(cluster) == there
        served.endpoints(REMOTE)
        assert served.ask("client-1").pod == REMOTE
        assert connection.who() == LOCAL


def test_a_worker_that_is_deaf_to_a_new_daemon_does_not_serve_on(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    before = workers(cluster)
    cluster.stop()
    deaf = min(before)
    os.kill(deaf, signal.SIGSTOP)
    try:
        cluster.start()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(deaf, signal.SIGCONT)
    served.endpoints(REMOTE)
    assert set(served.pods("client-1")) == {REMOTE}
    until(lambda: set(listening(cluster, 80)) == workers(cluster), "each listens")
    assert workers(cluster) & before == before - {deaf}
    assert len(workers(cluster)) == len(before)


# Upgrades

RATE = 300.0
"""New TCP connections a second, on three hosts together."""
MORE = 40
"""So many more on each host before, between and after."""
KEPT = 6


@pytest.fixture
def upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let whatever is started from now on be of another version.

    `vipd.proxy` is a namespace package: its version is looked for in this folder first.
    """

    def install(version: str) -> None:
        folder = tmp_path / version / "vipd" / "proxy"
        folder.mkdir(parents=True)
        (folder / "version.py").write_text(f'"""Another one."""\n\nVERSION = "{version}"\n')
        path = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / version}{os.pathsep}{path}")

    return install


def loaded(cluster: Cluster) -> Load:
    works = switch_cluster.works(
        cluster.lab.topology, RATE, kept=KEPT, patience_seconds=DEADLINE_SECONDS
    )
    return Load(cluster.lab, works)


def unharmed(report: Report) -> None:
    """Nothing was refused, reset or silent. A UDP flow may go to another endpoint."""
    told = [f"{one.at:.2f} {one}" for one in report.failures if "moved" not in one.reason]
    assert report.sum(Kind, "failed") == 0, "\n".join(told)
    assert all(count.answers > 0 for count in report.counts.values())
    assert report.counts[Kind.NEW_TCP].answers > 3 * MORE


def test_an_upgrade_replaces_the_workers_and_no_connection_is_refused(
    cluster: Cluster, upgrade: Callable[[str], None]
) -> None:
    (cluster.folder / "loaded.json").write_bytes(switch_cluster.services(cluster.lab.topology))
    cluster.settled()
    old = workers(cluster)
    with loaded(cluster) as load:
        load.wait_for(MORE)
        cluster.stop()
        upgrade("9.9")
        load.wait_for(MORE)
        cluster.start()
        until(lambda: set(listening(cluster, 80)).isdisjoint(old), "others listen")
        new = workers(cluster) - old
        assert len(new) == len(old)
        load.wait_for(MORE)
        assert set(listening(cluster, 80)) == new
        kept = clients(cluster, 80)
        load.wait_for(MORE)
        cluster.stop()
        load.wait_for(MORE)
        cluster.start()  # it finds both the workers and those that only end what they have
        load.wait_for(MORE)
        assert workers(cluster) == old | new
        after = clients(cluster, 80)
        report = load.stop()
    unharmed(report)
    for one in old:
        assert after[one]
        assert after[one] <= kept[one]


async def test_replaced_workers_end_with_their_last_connection(
    cluster: Cluster, endpoints: Endpoints, upgrade: Callable[[str], None]
) -> None:
    dual_stack(cluster)
    old = workers(cluster)
    crowd = Crowd(cluster)
    async with asyncio.timeout(HANG_SECONDS):
        first, second, third = asyncio.Event(), asyncio.Event(), asyncio.Event()
        begun = await crowd.greet(NEWCOMERS, first)
        assert served_by(cluster, begun) == old
        upgrade("9.9")
        await asyncio.to_thread(cluster.stop)
        await asyncio.to_thread(cluster.start)
        until(lambda: set(listening(cluster, 80)).isdisjoint(old), "others listen")
        new = workers(cluster) - old
        assert served_by(cluster, await crowd.greet(NEWCOMERS, second)) == new
        upgrade("9.10")
        await asyncio.to_thread(cluster.stop)
        await asyncio.to_thread(cluster.start)
        until(lambda: set(listening(cluster, 80)).isdisjoint(old | new), "others listen again")
        newest = workers(cluster) - old - new
        assert len(newest) == len(old)
        assert workers(cluster) == old | new | newest

        assert served_by(cluster, begun) == old
        second.set()
        await asyncio.to_thread(until, lambda: not new & workers(cluster), "the second have ended")
        assert old <= workers(cluster)
        first.set()
        await asyncio.to_thread(until, lambda: workers(cluster) == newest, "the first have ended")
        assert served_by(cluster, await crowd.greet(NEWCOMERS, third)) == newest
        third.set()
        await crowd.ended()
    assert known(crowd.lost()) == []
    assert endpoints.said(streams.WRONG) == endpoints.said(streams.SHORT) == {}


@pytest.mark.parametrize("over", [UDP4, UDP6], ids=str)
def test_a_reply_that_is_under_way_during_an_upgrade_arrives(
    cluster: Cluster, upgrade: Callable[[str], None], over: Flavour
) -> None:
    with Ends(cluster) as ends:
        endpoint = ends.endpoint("web-1", over)
        client = ends.connected(ends.serve(over, "web-1"))
        for one in (endpoint, client):
            one.settimeout(DEADLINE_SECONDS)
        client.send(b"before")
        data, first = endpoint.recvfrom(2048)
        upgrade("9.9")
        cluster.stop()
        cluster.start()
        endpoint.sendto(b"to " + data, first)
        assert client.recv(2048) == b"to before"
        client.send(b"after")
        data, second = endpoint.recvfrom(2048)
        assert second != first, "the successor has a session of its own"
        endpoint.sendto(b"to " + data, second)
        assert client.recv(2048) == b"to after"


KILLER = """
import os, signal
from vipd.backends.userspace.messages import Batch, HandOver
from vipd.backends.userspace.worker import Worker
from vipd.proxy.cli.main import main

ask = Worker.ask

async def asked(worker, request, given=()):
    what = type(request).__name__ + (" with sockets" if given else "")
    if ({step!r}, {word!r}) == ("before", what):
        os.kill(os.getpid(), signal.SIGKILL)
    answer = await ask(worker, request, given)
    if ({step!r}, {word!r}) == ("after", what):
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

Worker.ask = asked
main()
"""
"""The daemon, killed as it asks a worker for something, or has been answered."""


@pytest.mark.parametrize(
    ("step", "word"),
    [("before", "HandOver"), ("after", "HandOver"), ("after", "Batch with sockets")],
    ids=["successor-is-there", "listeners-are-under-way", "listeners-were-given"],
)
async def test_a_daemon_that_is_killed_during_an_upgrade_is_followed_by_one_that_finishes_it(
    cluster: Cluster, endpoints: Endpoints, upgrade: Callable[[str], None], step: str, word: str
) -> None:
    dual_stack(cluster)
    old = workers(cluster)
    crowd = Crowd(cluster)
    async with asyncio.timeout(HANG_SECONDS):
        go = asyncio.Event()
        begun = await crowd.greet(NEWCOMERS, go)
        cluster.stop()
        upgrade("9.9")
        script = KILLER.format(step=step, word=word)
        command = [sys.executable, "-P", "-c", script, *cluster.daemon.arguments]
        with cluster.daemon.log.open("ab") as output:  # not a pipe: workers would keep it open
            killed = cluster.lab.popen("node", command, stdout=output, stderr=output)
        code = await asyncio.to_thread(killed.wait, DEADLINE_SECONDS)
        assert code == -signal.SIGKILL, cluster.daemon.log_tail()
        assert served_by(cluster, begun) == old
        await asyncio.to_thread(cluster.start)
        cluster.settled()
        until(lambda: set(listening(cluster, 80)).isdisjoint(old), "others listen")
        assert len(set(listening(cluster, 80))) == len(old)
        newcomers = await crowd.greet(NEWCOMERS, go)
        assert served_by(cluster, newcomers) == set(listening(cluster, 80))
        assert served_by(cluster, begun) == old
        go.set()
        await crowd.ended()
        listen = set(listening(cluster, 80))
        await asyncio.to_thread(until, lambda: workers(cluster) == listen, "no others are left")
    assert known(crowd.lost()) == []
