"""The measures of `vipd bench dns` on one server that answers.

Lives here: load from the client pod, and figures. Must not: start or stop a server, or know rounds.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from vipd.bench import dns_tools
from vipd.bench.dns_paced import Latencies
from vipd.bench.dns_plan import CLIENT, THROUGHPUT, Measure, Plan
from vipd.bench.dns_questions import dnsperf, questions, rcodes
from vipd.bench.dns_servers import Server
from vipd.bench.lab import Lab
from vipd.bench.lab_errors import LabError

CLIENTS, UNDER_WAY = 4, 100
"""Sockets of dnsperf, and questions under way of all of them together."""
_PATIENCE_SECONDS = 60.0
_ONCE_SECONDS = "20"


class Probe:
    """Takes measures of one server. `failures` tells what went wrong beside a figure."""

    def __init__(self, lab: Lab, server: Server, plan: Plan, folder: Path) -> None:
        self.figures: dict[str, float] = {}
        self.failures: list[str] = []
        self._lab, self._server, self._plan, self._folder = lab, server, plan, folder

    def take(self, measure: Measure) -> None:
        """Take one measure; raise LabError or Unreadable where it fails."""
        if measure in THROUGHPUT:
            self._throughput(measure)
        else:
            steps: dict[Measure, Callable[[], None]] = {
                Measure.START: self._start,
                Measure.LATENCY: self._latency,
                Measure.MEMORY: self._memory,
            }
            steps[measure]()
        self._server.check()

    def _start(self) -> None:
        self.figures["start"] = self._server.start_seconds

    def _memory(self) -> None:
        self.figures["rss"] = self._server.memory() / 1e6

    def _throughput(self, measure: Measure) -> None:
        """Ask everything once, so that what can be known by heart is, and then for a time.

        Who is too slow for it has as long as for the measure; what others are asked for, longer.
        """
        asked = questions(measure, self._plan.services)
        file, seconds = self._folder / measure, str(self._plan.seconds)
        file.write_text("".join(f"{one}\n" for one in asked))
        once = _ONCE_SECONDS if measure is Measure.FORWARDED else seconds
        self._dnsperf(measure, file, "-n", "1", "-l", once)
        before = self._server.cpu_seconds()
        told = dnsperf(self._dnsperf(measure, file, "-l", seconds))
        taken = self._server.cpu_seconds() - before
        self.figures[measure] = told.rate
        if taken:
            self.figures[f"{measure}_cpu"] = told.completed / taken
        problem = told.problem(rcodes(measure))
        if problem is not None:
            self.failures.append(f"{measure}: {problem}")

    def _dnsperf(self, measure: Measure, file: Path, *length: str) -> str:
        command = [
            *(dns_tools.path("dnsperf"), "-s", self._server.address, "-d", str(file), *length),
            *("-m", "tcp" if measure is Measure.TCP else "udp", "-c", str(CLIENTS), "-T", "1"),
            *("-q", str(UNDER_WAY), "-t", "2"),
        ]
        done = self._lab.exec(CLIENT, command, timeout=self._plan.seconds + _PATIENCE_SECONDS)
        if done.returncode:
            raise LabError(f"dnsperf: {(done.stderr or done.stdout).strip()[-300:]}")
        return done.stdout

    def _latency(self) -> None:
        with Paced(self._lab, self._server.address, self._plan, self._plan.seconds) as paced:
            told = paced.told()
        self.figures |= {"p50": told.p50, "p99": told.p99}
        if lost := told.sent - told.answered:
            self.failures.append(f"latency: {lost} of {told.sent} questions had no answer")


class Paced:
    """Questions at the plan's rate from the client pod, inside the block."""

    def __init__(
        self, lab: Lab, address: str, plan: Plan, seconds: float, services: int | None = None
    ) -> None:
        command = [sys.executable, "-P", "-m", "vipd.bench.dns_paced"]
        self._seconds = seconds
        self._names = questions(Measure.KNOWN, plan.services if services is None else services)
        self._process = lab.popen(
            CLIENT,
            [*command, address, str(plan.rate), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> "Paced":
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(f"{one}\n" for one in self._names).encode())
        process.stdin.close()
        process.stdout.readline()  # it begins
        return self

    def stop(self) -> None:
        """Ask no more."""
        self._process.terminate()

    def told(self) -> Latencies:
        """Return what became of the questions, at their end; raise LabError."""
        assert self._process.stdout is not None
        printed = self._process.stdout.read()
        try:
            told = msgspec.json.decode(printed, type=Latencies)
        except msgspec.DecodeError as error:
            raise LabError(f"the questions at a given rate ended: {error}") from error
        if not told.answered:
            raise LabError("no question had an answer")
        return told

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
