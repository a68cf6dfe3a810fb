"""What the control socket answers: the state of the daemon, read where it lives.

Lives here: one method for each request. Must not: compute anything of its own beyond putting
together (views.py, status.py), or change anything but by asking for a switch.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from vipd.backends.usage import Counting, Usage
from vipd.dns.server.service import DnsService
from vipd.proxy import views
from vipd.proxy.config import Config
from vipd.proxy.control import Reader
from vipd.proxy.counted import worker
from vipd.proxy.departures import Departures
from vipd.proxy.environment import Environment, checked, environment, wanted
from vipd.proxy.errors import ControlError, DataplaneError
from vipd.proxy.explain import Explanation
from vipd.proxy.follow import follow
from vipd.proxy.http.service import HttpService
from vipd.proxy.question import question
from vipd.proxy.sources.protocol import Source
from vipd.proxy.status import (
    DnsView,
    Status,
    SwitchReport,
    judged,
    late,
    worker_notes,
    worker_trouble,
)
from vipd.proxy.switch import LONGEST_DRAIN_SECONDS
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync
from vipd.proxy.version import VERSION

COUNTERS, WORKERS = "counters", "workers"
"""Arguments of the requests `services` and `status`."""
NOT_OURS = "the address is not this node's, so no question comes there"
PATIENCE_SECONDS = 2.0
"""How long the status waits for workers: it has more to say than what they do."""


class SwitchRequest(Struct, frozen=True):
    """The argument of the request `switch`; `drain_seconds` None is the configured time."""

    mode: str
    drain_seconds: Annotated[float, Meta(ge=0, le=LONGEST_DRAIN_SECONDS)] | None = None
    force: bool = False


class Answers:
    """Reads the running daemon for whoever asks on the control socket.

    `notes` are sentences of the other parts for those who read the status.
    """

    def __init__(
        self,
        config: Config,
        sync: Sync,
        switching: Switching,
        departures: Departures,
        source: Source,
        started: float,
        dns: DnsService,
        http: HttpService,
        notes: Callable[[], Iterable[str]],
    ) -> None:
        self._config = config
        self._sync = sync
        self._switching = switching
        self._departures = departures
        self._source = source
        self._started = started
        self._dns = dns
        self._http = http
        self._notes = notes

    def requests(self) -> Mapping[str, Reader]:
        """Return the requests by name."""
        return {
            "status": self.status,
            "services": self.services,
            "program": self.program,
            "settings": self.settings,
            "switch": self.switch,
            "try-switch": self.try_switch,
            "explain": self.explain,
            "environment": self.environment,
        }

    async def status(self, argument: str = "") -> Status:
        """Return how the daemon is; with the argument ``workers``, also how these are.

        The pure work is done off the event loop.
        """
        usage, silence = await self._workers() if argument == WORKERS else (Usage(), ())
        dns = await self._dns_view() if argument == WORKERS else None
        sync, switching = self._sync, self._switching
        table, serving = sync.table, switching.serving
        servers, endpoints = await asyncio.to_thread(views.counts, table)
        notes = await asyncio.to_thread(views.notes, sync.snapshot, table, self._sync.settings)
        said = Status(
            version=VERSION,
            pid=os.getpid(),
            mode=serving.mode,
            node=self._sync.settings.node_name,
            manifests=self._config.manifests,
            kubeconfig=None if self._config.manifests else self._config.kubeconfig,
            started=self._started,
            synced=serving.synced,
            services=len(sync.snapshot.services),
            virtual_servers=servers,
            endpoints=endpoints,
            syncs=serving.syncs,
            failed_syncs=serving.failed_syncs,
            last_sync=serving.last_sync,
            failure=serving.failure,
            problems=tuple(str(error) for error in sync.problems.values()),
            conflicts=tuple(map(str, table.contested.values())),
            rejected=tuple(views.rejected(table, serving.rejected)),
            notes=(*notes, *self._notes(), *worker_notes(usage)),
            passed_over=views.passed_over(self._source.passed_over),
            why_mode=switching.why,
            switch=switching.report,
            trouble=(
                *switching.draining.failures.values(),
                *filter(None, [switching.trouble()]),
                *(f"DNS at {one}: {NOT_OURS}" for one in self._dns.elsewhere),
                *silence,
                *worker_trouble(usage),
                *switching.repairs.trouble(),
                *self._node_trouble(),
                *self._late(),
                *self._http.trouble(),
            ),
            drains=switching.drains(),
            departed=self._departures.pending,
            flows_cut=switching.draining.flows_cut + self._departures.flows_cut,
            dns_listen=tuple(map(str, self._dns.listens)),
            dns_elsewhere=tuple(map(str, self._dns.elsewhere)),
            http=self._http.told(),
            repairs=switching.repairs.view(),
            workers=tuple(map(worker, usage.workers)),
            workers_wanted=usage.wanted,
            dns=dns,
        )
        return judged(said)

    def _node_trouble(self) -> Iterator[str]:
        """Yield what keeps this node from being one of the cluster's: manifests may have none."""
        sync = self._sync
        name = sync.settings.node_name
        node = sync.snapshot.nodes.get(name)
        if node is None and sync.listed and not self._config.manifests:
            yield f"no Node is called {name}: no endpoint is local, and /healthz answers 503"

    def _late(self) -> Iterator[str]:
        since = self._switching.serving.waiting_since
        return late(0.0 if since is None else time.monotonic() - since)

    async def services(self, argument: str = "") -> list[views.VirtualServerView]:
        """Return every virtual server, and last what is left to vipd's DNS server.

        With the argument ``counters``, also what the serving dataplane has counted of each, and
        with ``counters NAMESPACE/NAME`` that of one service (or of one port, ``…:PORT``) alone.
        """
        word, _, name = argument.partition(" ")
        servers = self._sync.table.virtual_servers()
        dns = await asyncio.to_thread(views.left_to_dns, self._sync.snapshot, self._sync.settings)
        if name:
            servers = [one for one in servers if name in (str(one.owner.service), str(one.owner))]
            dns = [one for one in dns if name in (one.service, one.service.rpartition(":")[0])]
        driver = self._switching.serving.driver
        usage = Usage()
        if word == COUNTERS and isinstance(driver, Counting):
            usage = await driver.usage(servers)
        rejected = {key: str(error) for key, error in self._switching.serving.rejected.items()}
        told = await asyncio.to_thread(views.services, servers, usage.by_server, rejected)
        return [*told, *dns]

    async def first(self, most: int) -> tuple[list[views.VirtualServerView], int]:
        """Return the first so many virtual servers by service, and how many there are.

        With what has been counted of them, where whoever counts answers in time.
        """
        table, serving = self._sync.table, self._switching.serving
        servers, total = await asyncio.to_thread(views.first, table, most)
        driver, usage = serving.driver, Usage()
        if isinstance(driver, Counting):
            with contextlib.suppress(DataplaneError, TimeoutError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    usage = await driver.usage(servers)
        shown = {one.key for one in servers}
        rejected = {key: str(why) for key, why in serving.rejected.items() if key in shown}
        return views.services(servers, usage.by_server, rejected), total

    async def _workers(self) -> tuple[Usage, tuple[str, ...]]:
        """Return what workers of the serving dataplane say, and a sentence where nobody answers."""
        driver = self._switching.serving.driver
        if not isinstance(driver, Counting):
            return Usage(), ()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await driver.usage(()), ()
        except (DataplaneError, TimeoutError) as error:
            why = str(error) or f"nothing within {PATIENCE_SECONDS:g} s"
            return Usage(), (f"workers do not answer: {why}",)

    async def _dns_view(self) -> DnsView | None:
        if not self._dns.listens:
            return None
        told = await self._dns.told()
        up: dict[str, bool] = {}
        heard: set[str] = set()
        for one in told:
            for name, labels, value in one.samples:
                at = dict(labels).get("to", "")
                if name == "vipd_dns_forward_upstream_down":
                    up[at] = up.get(at, True) and not value
                elif name == "vipd_dns_forward_upstream_round_trip_seconds":
                    heard.add(at)
        return DnsView(
            workers=len(told),
            wanted=self._dns.wanted,
            restarts=self._dns.restarts,
            synced=bool(told) and all(one.synced for one in told),
            services=max((one.services for one in told), default=0),
            questions=sum(sum(one.types.values()) for one in told),
            failed=sum(one.rcodes.get("SERVFAIL", 0) for one in told),
            upstreams={
                at: None if is_up and at not in heard else is_up for at, is_up in up.items()
            },
        )

    async def program(self, _: str = "") -> Raw:
        """Return what the serving dataplane has in the kernel, or null while that is in doubt."""
        serving = self._switching.serving
        if serving.program is None:
            return Raw(b"null")
        return Raw(await asyncio.to_thread(serving.compiler.dump, serving.program))

    async def settings(self, _: str = "") -> views.SettingsView:
        """Return the settings that the table and the program are made with."""
        own = self._sync.snapshot.own_addresses
        mode = self._switching.serving.mode
        return views.settings(mode, self._sync.settings, own, self._config.dataplane)

    async def switch(self, argument: str) -> SwitchReport:
        """Begin a switch and return its report as it is now."""
        asked = _request(argument)
        return self._switching.ask(asked.mode, asked.drain_seconds, force=asked.force)

    async def try_switch(self, argument: str) -> list[str]:
        """Return what a switch would do."""
        return await self._switching.try_out(_request(argument).mode)

    async def explain(self, argument: str) -> Explanation:
        """Return what a packet meets, as the serving dataplane has it loaded."""
        sync, serving = self._sync, self._switching.serving
        return await follow(
            question(argument),
            sync.snapshot,
            sync.table,
            self._sync.settings,
            self._config.dataplane,
            serving.mode,
            serving.program,
            serving.driver,
            serving.rejected,
        )

    async def environment(self, argument: str) -> Environment:
        """Return the variables of services that a pod would be started with now."""
        if not self._sync.listed:
            raise ControlError("the Services have not all been read yet")
        asked = checked(wanted(argument))
        services = self._sync.snapshot.services

        def made() -> Environment:
            pods = self._source.pods() if asked.pod else {}
            if pods is None:
                why = "the daemon reads no Pods of the API server; say --namespace only"
                raise ControlError(why)
            return environment(asked, services, pods)

        return await asyncio.to_thread(made)


def _request(argument: str) -> SwitchRequest:
    try:
        return msgspec.json.decode(argument, type=SwitchRequest)
    except msgspec.DecodeError as error:
        raise ControlError(f"request not understood: {error}") from error
