"""The process that makes the traffic of one host: `python -m vipd.bench.load_worker`.

Lives here: the order of events in it, and its conversation with `load.py`: one JSON line a message.
It is told its Work on the first line of standard input and answers `{}` once every kept flow has
had an answer; `counts` is answered with the Report so far; `stop` lets every kept flow speak once
more and is answered with the last Report. Ends with its standard input. Must not: know services.
"""

import itertools
import os
import resource
import sys
import time
from collections.abc import Sequence

import msgspec

from vipd.bench.load_flows import Attempts, KeptFlow, Ledger
from vipd.bench.load_loop import Loop
from vipd.bench.load_work import Kind, Target, Work

FIRST_SOURCE_PORT = 10_000
"""Kept UDP flows have the source ports from here on: below node ports and those of the kernel."""
_PAUSE_SECONDS = 0.1
_DOWNLOAD_PAUSE_SECONDS = 0.05
_CHECK_SECONDS = 0.1


class Worker:
    """One host's traffic, from the first packet to the last report."""

    def __init__(self, work: Work) -> None:
        self._loop = Loop()
        self._ledger = Ledger(work.host, work.pods)
        self._work = work
        self._attempts = self._make_attempts()
        self._flows = self._make_flows()
        self._began = 0.0
        self._ready = False
        self._stopping = False

    def _targets(self, protocol: str) -> list[Target]:
        return [one for one in self._work.targets if one.protocol == protocol]

    def _make_attempts(self) -> list[Attempts]:
        work = self._work

        def made(kind: Kind, targets: Sequence[Target], rate: float | None) -> Attempts:
            patience = work.patience_seconds
            return Attempts(self._loop, self._ledger, kind, targets, rate, work.at_once, patience)

        wanted = (
            (Kind.NEW_TCP, self._targets("tcp"), work.tcp_rate),
            (Kind.NEW_UDP, self._targets("udp"), work.udp_rate),
        )
        return [made(*one) for one in wanted if one[1] and one[2] != 0]

    def _make_flows(self) -> list[KeptFlow]:
        work, flows = self._work, []
        ports = itertools.count(FIRST_SOURCE_PORT)
        for kind, number, pause, protocol in (
            (Kind.KEPT_TCP, work.kept_tcp, _PAUSE_SECONDS, "tcp"),
            (Kind.DOWNLOAD, work.downloads, _DOWNLOAD_PAUSE_SECONDS, "tcp"),
            (Kind.IDLE_TCP, work.idle_tcp, None, "tcp"),
            (Kind.KEPT_UDP, work.kept_udp, _PAUSE_SECONDS, "udp"),
            (Kind.IDLE_UDP, work.idle_udp, None, "udp"),
        ):
            turn = itertools.cycle(self._targets(protocol))
            for _ in range(number):
                port = next(ports) if protocol == "udp" else 0
                flow = KeptFlow(self._loop, self._ledger, kind, next(turn), pause, port)
                flows.append(flow)
        return flows

    def run(self) -> None:
        """Make the traffic until standard input ends."""
        self._loop.watch_input(sys.stdin.fileno(), self._told)
        for flow in self._flows:
            flow.start()
        self._check()
        self._loop.run()

    def _told(self) -> None:
        for word in os.read(sys.stdin.fileno(), 4096).split() or [b"end"]:
            if word == b"counts":
                self._report()
            elif word == b"stop":
                self._stop()
            else:
                self._loop.stop()

    def _check(self) -> None:
        for flow in self._flows:
            flow.check(self._work.patience_seconds)
        if not self._ready and all(flow.answers or flow.is_broken for flow in self._flows):
            self._ready = True
            self._began = time.monotonic()
            for attempts in self._attempts:
                attempts.start()
            _say({})
        if self._stopping and not self._is_busy():
            self._end()
            return
        self._loop.after(_CHECK_SECONDS, self._check)

    def _is_busy(self) -> bool:
        return any(one.open for one in self._attempts) or any(one.waits for one in self._flows)

    def _stop(self) -> None:
        self._stopping = True
        self._ledger.report.seconds = time.monotonic() - self._began
        for attempts in self._attempts:
            attempts.stop()
        for flow in self._flows:
            flow.ask_last()

    def _end(self) -> None:
        for flow in self._flows:
            flow.close()
        _say(self._ledger.report)

    def _report(self) -> None:
        if not self._stopping:
            self._ledger.report.seconds = time.monotonic() - self._began
        _say(self._ledger.report)


def _say(message: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.flush()


def main() -> None:
    """Do the work that the first line says."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Worker(msgspec.json.decode(sys.stdin.buffer.readline(), type=Work)).run()


if __name__ == "__main__":
    main()
