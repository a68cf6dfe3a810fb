"""The measures of `vipd bench dns` that need the whole daemon: changes, and a sync of everything.

Lives here: the daemon with a dataplane and `--dns-listen`, and what is seen of its answers. Must
not: know rounds.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vipd.bench import dns_cluster, sync_cluster
from vipd.bench.datapath_report import quantile
from vipd.bench.dns_measures import Paced
from vipd.bench.dns_plan import CLIENT, NODE, Measure, Plan
from vipd.bench.dns_servers import until
from vipd.bench.lab import Lab
from vipd.bench.lab_daemon import CLI, Daemon
from vipd.bench.lab_errors import LabError

ASKED_IN_SYNC = 100
"""Services that there are before the sync, and that are asked for while it goes on."""
_START_SECONDS = 60.0
_CHANGE_SECONDS = 10.0
_SYNC_SECONDS = 60.0
_POLL_SECONDS = 0.05


class DaemonProbe:
    """Takes the measures of the daemon."""

    def __init__(self, lab: Lab, plan: Plan, folder: Path) -> None:
        self.figures: dict[str, float] = {}
        self.failures: list[str] = []
        self._lab, self._plan, self._folder = lab, plan, folder
        self._address = str(lab.node(NODE).ipv4)
        self._socket = ""

    def take(self, measure: Measure) -> None:
        """Take one measure; raise LabError where it fails."""
        (self._changes if measure is Measure.CHANGE else self._sync)()

    def _changes(self) -> None:
        """Endpoints of headless services come and go, one at a time, among all services."""
        with self._daemon(self._plan.services) as manifests:
            times = self._lab.run(CLIENT, lambda: self._timed(manifests))
        times.sort()
        self.figures["change_p50"] = quantile(times, 0.5) * 1000
        self.figures["change_p99"] = quantile(times, 0.99) * 1000

    def _timed(self, manifests: Path) -> list[float]:
        pause = random.Random(self._plan.changes)
        times = []
        for number in range(self._plan.changes):
            # An idle moment of random length, so that no change meets the one before at work.
            time.sleep(pause.uniform(0.03, 0.08))
            times.append(self._change(manifests, number))
        return times

    def _change(self, manifests: Path, number: int) -> float:
        """Create, extend, shrink and delete a service in turn; return the seconds until seen."""
        kind, name = number % 4, f"changed-{number // 4}"
        path = manifests / f"{name}.json"
        first = sync_cluster.endpoint_address(4_000_000 + 2 * number)
        endpoints = ([first], [first, first + 1], [first + 1], [])[kind]
        if kind == 3:
            began = time.monotonic()
            path.unlink()
        else:
            draft = path.with_suffix(".draft")
            items = dns_cluster.headless_objects(name, endpoints)
            draft.write_bytes(sync_cluster.listed(items))
            began = time.monotonic()
            draft.replace(path)
        wanted = frozenset(map(str, endpoints))
        owner = f"{name}.{dns_cluster.SUFFIX}"
        return until(self._address, owner, wanted.__eq__, _CHANGE_SECONDS) - began

    def _sync(self) -> None:
        """Some services are asked for while all the others come at once."""
        plan = self._plan
        with (
            self._daemon(ASKED_IN_SYNC) as manifests,
            Paced(self._lab, self._address, plan, _SYNC_SECONDS, ASKED_IN_SYNC) as paced,
        ):
            draft = manifests / "cluster.draft"
            draft.write_bytes(dns_cluster.services(plan.services).manifests)
            draft.replace(manifests / "cluster.json")
            last = dns_cluster.name_of(plan.services - 1)
            self._lab.run(CLIENT, lambda: until(self._address, last, bool, _SYNC_SECONDS))
            self._until_programmed()
            paced.stop()
            told = paced.told()
        self.figures["sync_p50"], self.figures["sync_p99"] = told.p50 / 1000, told.p99 / 1000
        if lost := told.sent - told.answered:
            self.failures.append(f"sync: {lost} of {told.sent} questions had no answer")

    def _until_programmed(self) -> None:
        """Wait until the dataplane has the last service, which comes with all others."""
        address = sync_cluster.service_address(self._plan.services - 1)
        command = ["nft", "get", "element", "ip", "vipd", "cluster-ips", f"{{ {address} }}"]
        deadline = time.monotonic() + _SYNC_SECONDS
        while (done := self._lab.exec(NODE, command)).returncode:
            if time.monotonic() > deadline:
                raise LabError(f"the dataplane is not in step: {done.stderr.strip()}")
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _daemon(self, services: int) -> Iterator[Path]:
        """The daemon with so many services; the folder of its manifests."""
        folder = self._folder / f"daemon-{services}"
        manifests = folder / "manifests"
        manifests.mkdir(parents=True)
        (manifests / "cluster.json").write_bytes(dns_cluster.services(services).manifests)
        daemon = Daemon(self._lab, manifests, folder)
        self._socket = str(daemon.socket)
        daemon.arguments = (
            *daemon.arguments,
            *("--service-cidr", str(sync_cluster.SERVICE_RANGE), "--dns-listen", self._address),
        )
        try:
            daemon.start(_START_SECONDS)
            last = dns_cluster.name_of(services - 1)
            self._lab.run(CLIENT, lambda: until(self._address, last, bool, _START_SECONDS))
            yield manifests
        finally:
            daemon.stop()
            # Workers outlive their daemon on purpose.
            self._lab.exec(NODE, [*CLI, "cleanup", "--socket", self._socket])
