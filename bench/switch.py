"""`vipd bench switch`: what a switch of the dataplane does to traffic that goes on meanwhile.

Lives here: one run of one pair of modes, or of none as a control, and its figures. The real daemon
is told by the real command. Must not: make traffic (load.py) or format (cli/bench.py).
"""

import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from vipd.backends.protocol import Capabilities, Driver
from vipd.bench import switch_cluster
from vipd.bench.lab import Lab, running
from vipd.bench.lab_daemon import CLI, Daemon
from vipd.bench.lab_errors import LabError
from vipd.bench.load import Load
from vipd.bench.load_work import Kind, Report
from vipd.proxy.control import read
from vipd.proxy.status import Status, SwitchReport

CONTROL = "control"
"""Stands for the target of a run without a switch."""
DRAIN_SECONDS = 60
"""Given to the dataplane that is left, so that no run takes for ever."""
START_SECONDS = 120.0
_POLL_SECONDS = 0.05
_SHORT_MEMORY = (
    ("netfilter/nf_conntrack_tcp_timeout_time_wait", "10"),
    ("netfilter/nf_conntrack_udp_timeout_stream", "30"),
)
"""Set on the lab's node, in seconds, so that it keeps seconds of closed connections, not minutes: a
table of nf_conntrack_max entries is not full by them, and a drain ends while one waits for it."""

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done (0 to 1)."""


class Result(Struct, frozen=True, kw_only=True):
    """What became of the traffic of one run. Times are in seconds."""

    origin: str
    target: str
    """The mode that was switched to; CONTROL where none was."""
    services: int
    rate: float
    """New TCP connections answered each second."""
    report: Report
    failed: int
    broken_tcp: int
    broken_udp: int
    switch_seconds: float | None = None
    """From the command's arrival in the daemon until the new dataplane is verified."""
    command_seconds: float | None = None
    """The same as the operator has it: the time that `vipd mode` takes."""
    drained_seconds: float | None = None
    """From the end of the load until nothing of the old dataplane was left."""
    flows_cut: int = 0
    """Flows that the drain had to end at its deadline."""
    failures: tuple[str, ...] = ()
    """The first failures in words, with the second after the command that they fell in."""

    @property
    def harmed(self) -> bool:
        """Whether any connection failed or any flow broke."""
        return bool(self.failed or self.broken_tcp or self.broken_udp)


def pairs(modes: Sequence[str]) -> list[tuple[str, str]]:
    """Return every ordered pair of different modes, each mode's control run before its pairs."""
    found: list[tuple[str, str]] = []
    for origin in modes:
        found.append((origin, CONTROL))
        found += [(origin, target) for target in modes if target != origin]
    return found


def lacking(modes: Sequence[str]) -> dict[str, str]:
    """Return, for each mode that this host cannot do, what it lacks."""
    from vipd.backends.registry import backend

    found_missing: dict[str, str] = {}
    with running(f"vb{os.getpid()}") as lab:
        node = lab.topology.proxy_node
        for mode in modes:
            driver = backend(mode).driver
            found = lab.run(node, partial(_probed, driver)).found
            missing = [one.remedy or one.name for one in found if one.needed and not one.present]
            if missing:
                found_missing[mode] = "; ".join(missing)
    return found_missing


def _probed(driver: Driver[Any, Any]) -> Capabilities:
    return asyncio.run(driver.probe())


def measure(
    origin: str,
    target: str,
    rate: float | None,
    seconds: float,
    services: int,
    progress: Progress,
    kept: int = 8,
    patience_seconds: float = 3.0,
) -> Result:
    """Run one pair in namespaces of its own: `seconds` of load, the switch after a third of it.

    `rate` is of new TCP connections a second, None as many as can be; `services` stand in the table
    beside those under load. Raise LabError where the switch itself does not succeed.
    """
    with (
        running(f"vb{os.getpid()}") as lab,
        tempfile.TemporaryDirectory(prefix="vipd-bench-") as folder,
    ):
        lab.run(lab.topology.proxy_node, _shorten_memory)
        manifests = Path(folder, "manifests")
        manifests.mkdir()
        progress("writing manifests", 0.0)
        Path(manifests, "nodes.json").write_bytes(switch_cluster.nodes(lab.topology))
        document = switch_cluster.services(lab.topology, services)
        Path(manifests, "services.json").write_bytes(document)
        daemon = Daemon(lab, manifests, Path(folder), origin)
        progress("starting", 0.0)
        daemon.start(START_SECONDS)
        try:
            works = switch_cluster.works(
                lab.topology, rate, kept=kept, patience_seconds=patience_seconds
            )
            with Load(lab, works) as load:
                _wait(seconds / 3, 0.0, seconds, progress)
                asked = time.monotonic()
                told = _switch(lab, daemon, target) if target != CONTROL else None
                command_seconds = time.monotonic() - asked
                _wait(2 * seconds / 3 - command_seconds, seconds / 3, seconds, progress)
                report = load.stop()
            progress("draining", 1.0)
            drained, cut = _drained(daemon) if told else (None, 0)
        finally:
            daemon.stop()
    return Result(
        origin=origin,
        target=target,
        services=services,
        rate=round(report.rate, 1),
        report=report,
        failed=report.failed,
        broken_tcp=report.broken_tcp,
        broken_udp=report.broken_udp,
        switch_seconds=_rounded(told.ended - told.started) if told and told.ended else None,
        command_seconds=_rounded(command_seconds) if told else None,
        drained_seconds=_rounded(drained),
        flows_cut=cut,
        failures=tuple(f"{one.at - asked:+.3f} s {one}" for one in report.failures),
    )


def slowest_milliseconds(result: Result) -> float:
    """Return how long the slowest new TCP connection took."""
    count = result.report.counts.get(Kind.NEW_TCP)
    return 0.0 if count is None else round(count.slowest_seconds * 1000, 1)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _shorten_memory() -> None:
    for name, value in _SHORT_MEMORY:
        Path("/proc/sys/net", name).write_text(value)


def _wait(seconds: float, done: float, whole: float, progress: Progress) -> None:
    """Let the load go on."""
    start = time.monotonic()
    while (left := start + seconds - time.monotonic()) > 0:
        progress("under load", (done + seconds - left) / whole)
        time.sleep(min(left, 0.5))


def _switch(lab: Lab, daemon: Daemon, target: str) -> SwitchReport:
    """Switch as an operator does."""
    command = [
        *(*CLI, "mode", target, "--drain", f"{DRAIN_SECONDS}s"),
        *("--json", "--socket", str(daemon.socket)),
    ]
    done = subprocess.run(
        lab.command(lab.topology.proxy_node, command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"vipd mode {target}: {done.stderr.strip()}\n{daemon.log_tail()}")
    return msgspec.json.decode(done.stdout, type=SwitchReport)


def _drained(daemon: Daemon) -> tuple[float | None, int]:
    """Wait until nothing drains; return the seconds that took (None: never), and flows cut."""
    start = time.monotonic()
    while True:
        status = msgspec.json.decode(read(str(daemon.socket), "status"), type=Status)
        taken = time.monotonic() - start
        if not status.drains:
            return taken, status.flows_cut
        if taken > DRAIN_SECONDS + 10:
            return None, status.flows_cut
        time.sleep(_POLL_SECONDS)
