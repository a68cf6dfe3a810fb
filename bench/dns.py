"""`vipd bench dns`: questions answered by vipd, beside name servers that people know.

Lives here: rounds of turns, each in a lab of its own. Must not: know how a measure is taken
(dns_measures.py, dns_daemon.py) or a server started (dns_servers.py), or format (cli/bench.py).
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from vipd.bench import dns_tools
from vipd.bench.datapath_measures import busy_cores
from vipd.bench.datapath_plan import order
from vipd.bench.datapath_printed import Unreadable
from vipd.bench.datapath_report import Turn
from vipd.bench.dns_cluster import SUFFIX, headless, name_of, services
from vipd.bench.dns_daemon import DaemonProbe
from vipd.bench.dns_measures import Probe
from vipd.bench.dns_plan import OF_DAEMON, THROUGHPUT, VIPD, Measure, Plan, expected
from vipd.bench.dns_report import Result, result
from vipd.bench.dns_servers import serving, upstream
from vipd.bench.lab import Lab, running
from vipd.bench.lab_errors import LabError

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done (0 to 1)."""
Take = Callable[[Measure], None]


def measure(plan: Plan, progress: Progress) -> Result:
    """Run all rounds. Raise LabError where dnsperf is missing or no variant can be measured.

    A measure that fails is told in its turn and leaves its figure out; the others go on.
    """
    dns_tools.require(plan.measures)
    missing = dns_tools.unavailable(plan.variants)
    variants = [one for one in plan.variants if one not in missing]
    if not variants:
        raise LabError("nothing to measure: " + "; ".join(missing.values()))
    progress("looking how busy the machine is", 0.0)
    busy = busy_cores()
    turns: list[Turn] = []
    steps = plan.rounds * len(variants)
    for number in range(plan.rounds):
        for variant in order(variants, number):

            def within(stage: str, share: float, title: str = f"{number + 1} {variant}") -> None:
                progress(f"round {title} {stage}", (len(turns) + share) / steps)

            turns.append(_Turn(variant, plan, within).run(number + 1))
    programs = [dns_tools.PROGRAMS[one] for one in variants if one in dns_tools.PROGRAMS]
    if any(one in THROUGHPUT for one in plan.measures):
        programs.append("dnsperf")
    tools = {one: dns_tools.version(one) for one in sorted(programs)}
    return result(plan, tools, busy, missing, turns)


class _Turn:
    """One variant in one round: every measure of it."""

    def __init__(self, variant: str, plan: Plan, progress: Progress) -> None:
        self._variant, self._plan, self._progress = variant, plan, progress
        self._measures = [one for one in plan.measures if expected(one, variant)]
        self._figures: dict[str, float] = {}
        self._failures: list[str] = []
        self._done = 0

    def run(self, number: int) -> Turn:
        """Start the variant afresh, as often as its measures need it."""
        with (
            running(f"vb{os.getpid()}") as lab,
            tempfile.TemporaryDirectory(prefix="vipd-bench-") as name,
            upstream(lab),
        ):
            for part in (self._of_server, self._of_headless, self._of_daemon):
                try:
                    part(lab, Path(name))
                except LabError as error:
                    self._failures.append(str(error))
        return Turn(
            round=number,
            variant=self._variant,
            figures=self._figures,
            failures=tuple(self._failures),
        )

    def _of_server(self, lab: Lab, folder: Path) -> None:
        alone = [one for one in self._measures if one not in (Measure.HEADLESS, *OF_DAEMON)]
        if not alone:
            return
        self._progress("starting", 0.0)
        count = self._plan.services
        with serving(lab, self._variant, services(count), folder, name_of(count - 1)) as server:
            probe = Probe(lab, server, self._plan, folder)
            self._take(alone, probe.take)
        self._figures |= probe.figures
        self._failures += probe.failures

    def _of_headless(self, lab: Lab, folder: Path) -> None:
        """Memory with one headless service, without a question asked."""
        if Measure.HEADLESS not in self._measures:
            return
        cluster = headless(self._plan.headless)
        last = f"peer-{self._plan.headless - 1}.peers.{SUFFIX}"
        below = folder / "headless"
        below.mkdir()
        with serving(lab, self._variant, cluster, below, last) as server:
            self._figures["headless"] = server.memory() / 1e6

    def _of_daemon(self, lab: Lab, folder: Path) -> None:
        wanted = [one for one in self._measures if one in OF_DAEMON]
        if not wanted or self._variant != VIPD:
            return
        probe = DaemonProbe(lab, self._plan, folder)
        self._take(wanted, probe.take)
        self._figures |= probe.figures
        self._failures += probe.failures

    def _take(self, measures: Sequence[Measure], take: Take) -> None:
        for one in measures:
            self._progress(one, self._done / len(self._measures))
            self._done += 1
            try:
                take(one)
            except (LabError, Unreadable) as error:
                self._failures.append(f"{one}: {error}")
