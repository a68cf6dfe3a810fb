"""`vipd bench sync`: how long it takes until a change, or a whole cluster, is live for packets.

Lives here: one run at one size and its figures. The real daemon, started as a user starts it, reads
manifests from a folder; a client in another namespace connects. Must not: format (cli/bench.py).
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from vipd.bench import api_process
from vipd.bench import sync_cluster as world
from vipd.bench import sync_probe as probe
from vipd.bench.api_process import ApiProcess
from vipd.bench.api_store import Json
from vipd.bench.lab import Lab, running
from vipd.bench.lab_daemon import Daemon
from vipd.bench.lab_errors import LabError

SAMPLE = 300
"""So many services are waited for before all are asked. The chance that none of them is in the
last of 45 portions, the most that a run has, is 1 in 800."""
START_TIMEOUT_SECONDS = 120.0
CHANGE_TIMEOUT_SECONDS = 10.0
KINDS = ("new service", "endpoint added", "endpoint removed", "service deleted")


class Latency(Struct, frozen=True):
    """Milliseconds from a change of the file until a packet shows it."""

    count: int
    p50: float
    p99: float
    worst: float


class Result(Struct, frozen=True):
    """Figures of one size. Memory is resident MB of the daemon and its children."""

    mode: str
    source: str
    services: int
    endpoints: int
    start_seconds: float
    """Process start until the last service answers."""
    changes: Latency
    kinds: dict[str, Latency]
    memory_start_mb: float
    """Highest during the start."""
    memory_churn_mb: float
    """Highest during the changes."""
    memory_after_mb: float
    """At rest, after the changes."""
    daemon_cpu_seconds: float
    """User and system time of the daemon and its children, start and changes together."""


Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done (0 to 1)."""


class Written(Protocol):
    """Where services are written, and the arguments that lead the daemon there."""

    arguments: tuple[str, ...]

    def put(self, name: str, items: list[Json]) -> float:
        """Create or replace a service and its slice; return when by the monotonic clock."""

    def remove(self, name: str, items: list[Json]) -> float:
        """Delete them; return when."""


class Folder:
    """Manifests: one file for each service that changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.arguments: tuple[str, ...] = ("--manifests", str(folder))

    def put(self, name: str, items: list[Json]) -> float:
        """Replace a manifest in one step, as an editor or a sync tool does; return when."""
        path = self._folder / f"{name}.json"
        draft = path.with_suffix(".draft")
        draft.write_bytes(world.listed(items))
        start = time.monotonic()
        draft.replace(path)
        return start

    def remove(self, name: str, items: list[Json]) -> float:
        """Delete the manifest."""
        start = time.monotonic()
        (self._folder / f"{name}.json").unlink()
        return start


class Cluster:
    """An API server."""

    def __init__(self, server: ApiProcess) -> None:
        self._server = server
        self._written: dict[str, list[Json]] = {}
        self.arguments: tuple[str, ...] = ("--kubeconfig", str(server.kubeconfig))

    def put(self, name: str, items: list[Json]) -> float:
        """Write what of the objects is new; return when the last of it was sent."""
        before = self._written.get(name, [])
        self._written[name] = items
        return self._server.put([one for one in items if one not in before])

    def remove(self, name: str, items: list[Json]) -> float:
        """Delete both; return when the first of it was sent."""
        return self._server.delete(self._written.pop(name, items))


def measure(
    services: int,
    endpoints: int,
    changes: int,
    progress: Progress,
    mode: str = "nftables",
    source: str = "manifests",
) -> Result:
    """Run one size in namespaces of its own and return its figures."""
    with (
        running(f"vb{os.getpid()}") as lab,
        tempfile.TemporaryDirectory(prefix="vipd-bench-") as folder,
        _endpoints(lab),
        ExitStack() as stack,
    ):
        manifests = Path(folder, "manifests")
        manifests.mkdir()
        progress("writing manifests", 0.0)
        whole = manifests / "cluster.json"
        whole.write_bytes(world.cluster(services, endpoints))
        written: Written = Folder(manifests)
        if source == "api":
            served = api_process.serving(lab, "node", Path(folder), whole)
            written = Cluster(stack.enter_context(served))
        daemon = Daemon(lab, written.arguments, Path(folder), mode)
        daemon.arguments = (*daemon.arguments, "--service-cidr", str(world.SERVICE_RANGE))
        progress("starting", 0.0)
        with _started(lab, daemon) as process, _Memory(process.pid) as memory:
            start = time.monotonic()
            process.go()
            ready = lab.run("client-1", lambda: _all_answer(services, process.check))
            memory_start = memory.take_highest()
            taken = lab.run("client-1", lambda: _changes(written, changes, progress))
            memory_churn = memory.take_highest()
            memory_after = memory.now()
            # Of children that have ended their parent knows, of those that run it does not.
            cpu = sum(map(_cpu_seconds, (process.pid, *_children(process.pid))))
    everything = [one for times in taken.values() for one in times]
    return Result(
        mode=mode,
        source=source,
        services=services,
        endpoints=endpoints,
        start_seconds=round(ready - start, 3),
        changes=_latency(everything),
        kinds={kind: _latency(times) for kind, times in taken.items()},
        memory_start_mb=memory_start,
        memory_churn_mb=memory_churn,
        memory_after_mb=memory_after,
        daemon_cpu_seconds=round(cpu, 2),
    )


def _all_answer(services: int, alive: Callable[[], None]) -> float:
    addresses = [world.service_address(number) for number in range(services)]
    sample = random.Random(services).sample(addresses, min(SAMPLE, services))
    return probe.until_all(sample, addresses, START_TIMEOUT_SECONDS, alive)


def _changes(written: Written, count: int, progress: Progress) -> dict[str, list[float]]:
    """Make `count` changes of mixed kinds, one at a time; return milliseconds by kind."""
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    pause = random.Random(count)
    for turn in range(count):
        kind = KINDS[turn % len(KINDS)]
        progress("changing", turn / count)
        # An idle moment of random length, so that no change meets the previous one at work.
        time.sleep(pause.uniform(0.03, 0.08))
        start, seen = _change(written, kind, turn // len(KINDS))
        taken[kind].append((seen - start) * 1000)
    progress("changing", 1.0)
    return taken


def _change(written: Written, kind: str, number: int) -> tuple[float, float]:
    """Make one change to the service `number`; return when it was made and when it was seen."""
    name = f"changed-{number}"
    address = world.changed_address(number)
    old = world.endpoint_address(4_000_000 + 2 * number)
    new = old + 1
    timeout = CHANGE_TIMEOUT_SECONDS
    match kind:
        case "new service":
            start = written.put(name, world.objects(name, address, [old]))
            return start, probe.until(lambda outcome: outcome is not None, address, timeout)
        case "endpoint added":
            start = written.put(name, world.objects(name, address, [old, new]))
            return start, probe.until(lambda outcome: outcome == str(new), address, timeout)
        case "endpoint removed":
            start = written.put(name, world.objects(name, address, [new]))
            return start, probe.until_gone(str(old), address, timeout)
        case _:
            start = written.remove(name, world.objects(name, address, [new]))
            return start, probe.until_unanswered(address, timeout)


@contextmanager
def _endpoints(lab: Lab) -> Iterator[None]:
    """One server on the second node that answers for every endpoint address."""
    ranged = str(world.ENDPOINT_RANGE)
    link = lab.node("node-2").addresses[0]
    lab.exec("node-2", ["ip", "route", "add", "local", ranged, "dev", "lo"], check=True)
    lab.exec(
        "node",
        ["ip", "route", "add", ranged, "via", str(link), "dev", "node-2", "onlink"],
        check=True,
    )
    server = lab.popen(
        "node-2",
        [sys.executable, "-P", "-m", "vipd.bench.sync_server", str(world.TARGET_PORT)],
        stdout=subprocess.PIPE,
    )
    try:
        if server.stdout is not None:
            server.stdout.readline()
        yield
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


class _Held:
    """A process that waits on its standard input before it becomes the daemon."""

    def __init__(self, process: subprocess.Popen[bytes], daemon: Daemon) -> None:
        self._process = process
        self._daemon = daemon
        self.pid = process.pid

    def go(self) -> None:
        """Let it run."""
        if self._process.stdin is not None:
            self._process.stdin.write(b"\n")
            self._process.stdin.close()

    def check(self) -> None:
        """Raise LabError where the daemon has ended."""
        if self._process.poll() is not None:
            code = self._process.returncode
            raise LabError(f"vipd ended with status {code}:\n{self._daemon.log_tail()}")


@contextmanager
def _started(lab: Lab, daemon: Daemon) -> Iterator[_Held]:
    """The daemon's process, inside the namespace but not yet running; ended after the block."""
    with daemon.log.open("wb") as log:
        process = lab.popen(
            "node",
            ["sh", "-c", 'read go; exec "$@" < /dev/null', "vipd", *daemon.command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _Held(process, daemon)
    finally:
        process.terminate()
        process.wait()


class _Memory:
    """Samples the resident memory of a process and its children in a thread."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._highest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self._highest = max(self._highest, self._kilobytes())

    def _kilobytes(self) -> int:
        # Between fork and exec a child shows its parent's pages as its own: not counted twice.
        command = _command(self._pid)
        children = [pid for pid in _children(self._pid) if _command(pid) != command]
        return sum(_resident_kilobytes(pid) for pid in (self._pid, *children))

    def take_highest(self) -> float:
        """Return the highest MB since the last call."""
        highest, self._highest = max(self._highest, self._kilobytes()), 0
        return round(highest / 1024, 1)

    def now(self) -> float:
        """Return the MB of this moment."""
        return round(self._kilobytes() / 1024, 1)


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(one) for one in task.read_text().split()]
        except OSError:
            continue
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _resident_kilobytes(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _latency(times: list[float]) -> Latency:
    if len(times) < 2:
        only = round(times[0], 2) if times else 0.0
        return Latency(len(times), only, only, only)
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return Latency(len(times), round(cuts[49], 2), round(cuts[98], 2), round(max(times), 2))
