"""The measures of `vipd bench datapath`: load from the client pod, figures from tools and kernel.

Lives here: one function for each measure, of one variant that serves. Must not: start or stop it,
or know rounds.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from vipd.bench import datapath_datagrams as datagrams
from vipd.bench import datapath_requests as requests
from vipd.bench import datapath_tools
from vipd.bench.datapath_plan import CLIENT, CONNECTIONS_EACH, Measure, Plan
from vipd.bench.datapath_printed import WRK_SCRIPT, Requests, busy_ticks, iperf3, wrk
from vipd.bench.datapath_report import Memory, quantile
from vipd.bench.datapath_variants import Proxy
from vipd.bench.lab import Lab
from vipd.bench.lab_errors import LabError

STREAMS = 4
"""Of iperf3, so that every worker may have one."""
OTHER_CLIENT = "client-2"
"""Has half of the idle connections: no client may have all that a worker of vipd takes."""
LATENCY_CONNECTIONS = 64
REQUESTS_EACH_PROCESS = 10_000
"""So many a second one process of the open loop sends with ease."""
_PATIENCE_SECONDS = 30.0
"""On top of the length of a measure."""
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

T = TypeVar("T")


class Probe:
    """Takes the measures of one variant in one round, in the order of Measure.

    Each adds to `figures`; what went wrong without spoiling the figure is in `failures`.
    """

    def __init__(self, lab: Lab, proxy: Proxy, plan: Plan, folder: Path) -> None:
        self.figures: dict[str, float] = {}
        self.failures: list[str] = []
        self.processes: tuple[Memory, ...] = ()
        self._lab = lab
        self._proxy = proxy
        self._plan = plan
        self._script = folder / "wrk.lua"
        self._script.write_text(WRK_SCRIPT)

    def take(self, measure: Measure) -> None:
        """Take one measure; raise LabError or Unreadable where it fails."""
        steps: dict[Measure, Callable[[], None]] = {
            Measure.MEMORY: self._memory,
            Measure.BULK: self._bulk,
            Measure.KEPT: self._kept,
            Measure.LATENCY: self._latency,
            Measure.NEW: self._new,
            Measure.UDP: self._udp,
        }
        steps[measure]()
        self._proxy.check()

    def _memory(self) -> None:
        if not (before := self._proxy.memory()):
            return
        asked, idle = self._proxy.asked, self._plan.idle
        shares = ((CLIENT, idle - idle // 2), (OTHER_CLIENT, idle // 2))
        holders = [
            self._start("datapath_idle", asked.address, str(asked.http), str(share), host=host)
            for host, share in shares
        ]
        try:
            for holder in holders:
                assert holder.stdout is not None
                if not holder.stdout.readline():
                    _, said = holder.communicate()
                    raise LabError(_last_line(said))
            self.processes = self._proxy.memory()
        finally:
            for holder in holders:
                holder.kill()
                holder.communicate()
        resident = sum(one.rss for one in self.processes)
        self.figures["rss"] = resident / 1e6
        self.figures["pss"] = sum(one.pss for one in self.processes) / 1e6
        if self._proxy.forwards:
            forwarding = [one for one in self.processes if one.forwards]
            self.figures["rss_proxy"] = sum(one.rss for one in forwarding) / 1e6
            self.figures["pss_proxy"] = sum(one.pss for one in forwarding) / 1e6
            self.figures["rss_each"] = (resident - sum(one.rss for one in before)) / 1e3 / idle

    def _bulk(self) -> None:
        asked = self._proxy.asked
        command = [
            *(datapath_tools.path("iperf3"), "--json", "--client", asked.address),
            *("--port", str(asked.bulk), "--time", str(self._plan.seconds)),
            *("--parallel", str(STREAMS)),
        ]
        printed, machine, processes = self._counted(lambda: self._printed(command))
        told = iperf3(printed)
        self.figures["bulk"] = told.bits_per_second / 1e9
        self._cost("bulk", machine, processes, told.bits / 1e9)

    def _kept(self) -> None:
        told, machine, processes = self._counted(lambda: self._requests("kept"))
        self.figures["kept"] = told.rate
        self._cost("kept", machine, processes, told.requests / 1e3)

    def _new(self) -> None:
        self.figures["new"] = self._requests("new", "--header", "Connection: close").rate

    def _latency(self) -> None:
        """Half of the rate that was measured on kept connections before, in an open loop."""
        if (kept := self.figures.get("kept")) is None:
            raise LabError("latency needs the rate of kept connections, which failed")
        rate = kept / 2
        most = min(self._plan.workers, LATENCY_CONNECTIONS)
        count = max(1, min(most, math.ceil(rate / REQUESTS_EACH_PROCESS)))
        asked = self._proxy.asked
        shared = (asked.address, str(asked.http), str(rate / count), str(self._plan.seconds))
        each = str(LATENCY_CONNECTIONS // count)
        answers = self._each(
            [("datapath_requests", *shared, each, str(seed)) for seed in range(count)],
            requests.Answers,
        )
        times = sorted(time for one in answers for time in one.microseconds)
        if not times:
            raise LabError("no request was answered")
        if unanswered := sum(one.unanswered for one in answers):
            self.failures.append(f"latency: {unanswered} requests unanswered")
        self.figures["p50"] = quantile(times, 0.5)
        self.figures["p99"] = quantile(times, 0.99)

    def _udp(self) -> None:
        if not self._proxy.has_udp:
            return
        asked = self._proxy.asked
        command = ("datapath_datagrams", "ask", asked.address, str(asked.udp))
        count = max(1, self._plan.workers // 2)
        answers = self._each([(*command, str(self._plan.seconds))] * count, datagrams.Answers)
        if not sum(one.answers for one in answers):
            raise LabError("no datagram was answered")
        self.figures["udp"] = sum(one.answers / one.seconds for one in answers)
        lost = sum(one.lost for one in answers)
        self.figures["udp_lost"] = 100 * lost / (lost + sum(one.answers for one in answers))

    def _requests(self, name: str, *options: str) -> Requests:
        workers, asked = self._plan.workers, self._proxy.asked
        command = [
            *(datapath_tools.path("wrk"), "--threads", str(workers)),
            *("--connections", str(workers * CONNECTIONS_EACH)),
            *("--duration", f"{self._plan.seconds}s", "--script", str(self._script)),
            *(*options, f"http://{asked.address}:{asked.http}/"),
        ]
        told = wrk(self._printed(command))
        if told.errors:
            self.failures.append(f"{name}: errors of {told.requests} requests: {told.errors}")
        return told

    def _cost(self, name: str, machine: float, processes: float, units: float) -> None:
        self.figures[f"{name}_cpu"] = machine * 1e3 / units
        if self._proxy.forwards:
            self.figures[f"{name}_cpu_proxy"] = processes * 1e3 / units

    def _counted(self, call: Callable[[], T]) -> tuple[T, float, float]:
        """Return what a call returns and the CPU seconds of machine and proxy meanwhile."""
        processes, machine = self._proxy.cpu_seconds(), busy_seconds()
        result = call()
        machine = busy_seconds() - machine
        return result, machine, self._proxy.cpu_seconds() - processes

    def _printed(self, command: Sequence[str]) -> str:
        """Return what a command on the client prints; raise LabError where it hangs."""
        try:
            done = self._lab.exec(CLIENT, command, timeout=self._plan.seconds + _PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise LabError(f"{Path(command[0]).name} does not end") from None
        return done.stdout or done.stderr

    def _each(self, commands: Sequence[Sequence[str]], told: type[T]) -> list[T]:
        """Run programs of the bench on the client at once; return what each says."""
        started = [self._start(*command) for command in commands]
        try:
            return [msgspec.json.decode(self._ended(one), type=told) for one in started]
        except subprocess.TimeoutExpired:
            raise LabError(f"{commands[0][0]} does not end") from None
        finally:
            for one in started:
                one.kill()
                one.wait()

    def _ended(self, process: subprocess.Popen[bytes]) -> bytes:
        printed, said = process.communicate(timeout=self._plan.seconds + _PATIENCE_SECONDS)
        if process.returncode != 0:
            raise LabError(_last_line(said))
        return printed

    def _start(self, program: str, *arguments: str, host: str = CLIENT) -> subprocess.Popen[bytes]:
        # -P: the working directory may hold a folder called dns or bench.
        return self._lab.popen(
            host,
            [sys.executable, "-P", "-m", f"vipd.bench.{program}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )


def _last_line(said: bytes) -> str:
    return said.decode(errors="replace").strip().rpartition("\n")[2] or "it ended in silence"


def busy_cores(seconds: float = 1.0) -> float:
    """Return how many cores are busy, watching for so long."""
    start, busy = time.monotonic(), busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - busy) / (time.monotonic() - start)


def busy_seconds() -> float:
    """Return the seconds that all cores together have worked since the machine started."""
    return busy_ticks(Path("/proc/stat").read_text()) / _CLOCK_TICKS
