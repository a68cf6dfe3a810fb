"""Everything at once, at random: the API server fails in every way it has, objects come and go, the
daemon is killed, its rules are flushed. After each round the kernel has exactly what the API says.

`VIPD_EXPLORE=N` lets it go on for N rounds, 200 at most. A seed that failed is printed;
`VIPD_CHAOS_SEED=SEED` begins with it. What is done follows from the seed, when it meets the daemon
does not.
"""

import asyncio
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from tests.netns.api import ApiCluster
from tests.netns.cluster import LOCAL, NFT, TABLES, TCP4, TCP6, UDP4, Served, until

from vipd.backends.registry import backend
from vipd.bench import lab_daemon
from vipd.bench.api_server import failure
from vipd.bench.lab import Lab
from vipd.proxy.control import read

pytestmark = [
    pytest.mark.netns,
    # Of the API server: a connection that was accepted as its loop ended is closed by nobody else.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EXPLORE = min(int(os.environ.get("VIPD_EXPLORE", "0")), 200)
ROUNDS = EXPLORE or 5
SEED = int(os.environ.get("VIPD_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
PODS = ("web-1", "web-2", "web-3", "web-4", "web-5", "web-6")
SETTLED_SECONDS = 60.0
SOON = (
    "import vipd.proxy.sources.kubernetes.pace as pace\n"
    "pace.FIRST_SECONDS, pace.LONGEST_SECONDS = 0.02, 0.5\n"
    "from vipd.proxy.cli.main import main\n"
    "main()\n"
)
"""The daemon, but that it does not wait long for a server that fails; its pace has tests."""
Fault = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


async def _written(request: web.Request, body: bytes, *, cut: bool) -> web.StreamResponse:
    response = web.StreamResponse()
    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
        await response.write(body)
        if cut and request.transport is not None:
            request.transport.abort()
    return response


class Weather:
    """Faults of the API server, drawn for each request while `bad` is set."""

    def __init__(self, lots: random.Random) -> None:
        self._lots = lots
        self.bad = False

    async def __call__(self, request: web.Request) -> web.StreamResponse | None:
        if not self.bad or request.method != "GET" or self._lots.random() < 0.3:
            return None
        watches = request.query.get("watch") == "true"
        match self._lots.randrange(10):
            case 0:
                # Not 403: a kind that is not needed is left alone for minutes then.
                return failure(self._lots.choice((500, 502, 503, 504, 401)), "Odd", "not now")
            case 1:
                return failure(429, "TooManyRequests", "slow down", **{"Retry-After": "0"})
            case 2:
                return failure(410, "Expired", "too old resource version")
            case 3:
                return await _written(request, b"", cut=True)
            case 4:
                return await _written(request, b'{"kind":"ServiceList","items":[{"met', cut=True)
            case 5:
                return web.Response(status=307, headers={"Location": "http://127.0.0.1:1/"})
            case 6 if watches:
                status = b'{"kind":"Status","code":410,"message":"too old"}'
                return await _written(
                    request, b'{"type":"ERROR","object":%s}\n' % status, cut=False
                )
            case 6:
                empty = b'{"kind":"PodList","metadata":{"resourceVersion":"1"},"items":[]}'
                return await _written(request, empty, cut=False)
            case 7:
                return await _written(request, b"\x00garbage\n\xff\xff\n", cut=False)
            case 8:
                await asyncio.sleep(self._lots.uniform(0.05, 0.5))
                return None
            case _ if watches:  # says nothing, and breaks off
                await asyncio.sleep(self._lots.uniform(0.05, 0.5))
                return await _written(request, b"", cut=True)
        return None


class Asking:
    """Asks a service that never changes all the time; what failed, and from when to when."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.failed: list[tuple[float, float, str]] = []
        self.count = 0

    def _run(self) -> None:
        while not self._ended.wait(0.005):
            begun = time.monotonic()
            try:
                self._served.ask("client-1", timeout=5)
            except OSError as error:
                self.failed.append((begun, time.monotonic(), repr(error)))
            self.count += 1

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


class Chaos:
    """One daemon, one API server, and what is done to them."""

    def __init__(self, cluster: ApiCluster, folder: Path) -> None:
        self.lots = random.Random(SEED)
        self.cluster = cluster
        self.weather = Weather(random.Random(SEED + 1))
        cluster.api.server.faults.append(self.weather)
        self.flushed: list[tuple[float, float]] = []
        self._folder = folder
        self._flushes = 0
        self._flushed_at: float | None = None
        self._done: list[str] = []
        self._services: list[Served] = [
            Served(cluster, flavour, {}) for flavour in (TCP4, TCP6, UDP4) for _ in range(5)
        ]

    def round(self) -> None:
        """Do things, then see that everything is as the API says."""
        self._done = []
        self.weather.bad = self.lots.random() < 0.7
        steps = (self._churn, self._churn, self._cut, self._compact, self._away, self._kill)
        for _ in range(self.lots.randrange(4, 9)):
            step = self.lots.choice((*steps, self._restart, self._flush))
            self._done.append(step.__name__)
            step()
            time.sleep(self.lots.choice((0.0, 0.02, 0.2)))  # so that steps meet all stages
        self.weather.bad = False
        self.cluster.api.do(self.cluster.api.server.cut)
        self._check()

    def _check(self) -> None:
        deadline = time.monotonic() + SETTLED_SECONDS
        while True:
            try:
                self.cluster.settled()
                until(self.cluster.matches_the_kernel, "the kernel has it")
                until(lambda: self.cluster.tables() == set(TABLES), "its tables are there")
                until(lambda: not self.cluster.status().degraded, "it is healthy")
            except AssertionError as error:
                if time.monotonic() > deadline:
                    told = f"{error}; {self.cluster.status().problems}; {self._difference()}"
                    raise AssertionError(f"{self}: {told}") from error
            else:
                break
        if self._flushed_at is not None:
            self.flushed.append((self._flushed_at, time.monotonic()))
            self._flushed_at = None

    def _difference(self) -> str:
        """What the kernel has otherwise than the daemon says it programmed."""
        dataplane = backend(self.cluster.mode)
        told = dataplane.compiler.load(read(self.cluster.socket, "program"))
        seen = self.cluster.lab.run("node", lambda: asyncio.run(dataplane.driver.observe()))
        fields = [one for one in told.__struct_fields__ if getattr(seen, one) != getattr(told, one)]
        return "; ".join(f"{x}: {getattr(seen, x)} is not {getattr(told, x)}" for x in fields)

    def __str__(self) -> str:
        return f"VIPD_CHAOS_SEED={SEED}, this round: {' '.join(self._done)}"

    def _churn(self) -> None:
        for _ in range(self.lots.randrange(1, 12)):
            served = self.lots.choice(self._services)
            match self.lots.randrange(4):
                case 0:
                    self.cluster.remove(served.manifest(), served.slice())
                case 1:
                    served._spec = {"type": self.lots.choice(("ClusterIP", "NodePort"))}
                    self.cluster.apply(served.manifest())
                case _:
                    pods = self.lots.sample(PODS, self.lots.randrange(4))
                    served._endpoints = [served.endpoint(pod) for pod in pods]
                    self.cluster.apply(served.slice(), served.manifest())

    def _cut(self) -> None:
        self.cluster.api.do(self.cluster.api.server.cut)

    def _compact(self) -> None:
        """Nothing that was can be asked for any more."""

        def forget() -> None:
            for collection in self.cluster.api.store.collections.values():
                collection.forget()
            self.cluster.api.store.next()
            self.cluster.api.server.cut()

        self.cluster.api.do(forget)

    def _away(self) -> None:
        self.cluster.api.stop()
        self._churn()
        time.sleep(self.lots.choice((0.0, 0.1, 0.4)))
        self.cluster.api.start()

    def _kill(self) -> None:
        self._end(signal.SIGKILL)

    def _restart(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process = self.cluster.daemon._process
        assert process is not None
        assert process.poll() is None, f"{self}: it has ended: {self.cluster.daemon.log_tail()}"
        process.send_signal(number)
        code = process.wait(20)
        assert code in (0, -signal.SIGKILL), f"{self}: {self.cluster.daemon.log_tail()}"
        start(self.cluster)

    def _flush(self) -> None:
        """By somebody else each time: the same party would be waited for."""
        self._flushes += 1
        other = self._folder / f"flusher-{self._flushes}"
        other.symlink_to(NFT)
        what = self.lots.choice(
            (
                ["flush", "ruleset"],
                ["delete", "table", "ip", "vipd"],
                ["flush", "chain", "ip", "vipd", "dispatch"],
                ["delete", "table", "ip6", "vipd-skeleton"],
                ["flush", "table", "ip6", "vipd"],
            )
        )
        if self._flushed_at is None:
            self._flushed_at = time.monotonic()
        self.cluster.lab.exec("node", [str(other), *what])


def start(cluster: ApiCluster) -> None:
    """Start the daemon, and wait until it answers: it may not be synced for a while."""
    daemon = cluster.daemon
    with daemon.log.open("ab") as log:
        daemon._process = cluster.lab.popen("node", daemon.command, stdout=log, stderr=log)
    pid = daemon._process.pid

    def answers() -> bool:
        with contextlib.suppress(Exception):
            return cluster.status().pid == pid
        return False

    until(answers, "the daemon answers")


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiCluster]:
    monkeypatch.setattr(lab_daemon, "CLI", (sys.executable, "-P", "-c", SOON))
    made = ApiCluster(lab, tmp_path)
    made.api.start()
    start(made)
    yield made
    made.stop()
    made.api.stop()
    made.wipe()


def test_after_all_that_the_kernel_has_what_the_api_says(
    cluster: ApiCluster, tmp_path: Path
) -> None:
    print(f"VIPD_CHAOS_SEED={SEED}")
    stays = cluster.serve(TCP4, LOCAL)
    chaos = Chaos(cluster, tmp_path)
    with Asking(stays) as asking:
        for _ in range(ROUNDS):
            chaos.round()
            before = asking.count
            until(lambda before=before: asking.count > before, "somebody asks")  # type: ignore[misc]
    failed = [
        one
        for one in asking.failed
        if not any(one[0] < end and begin < one[1] for begin, end in chaos.flushed)
    ]
    assert failed == [], f"{chaos}: {len(failed)} of {asking.count} while nobody had flushed"
    assert stays.outcome("client-1") == f"{LOCAL} saw client-1"
