"""What the control socket answers: the state of the daemon, read where it lives.

Lives here: one method for each request. Must not: compute anything of its own beyond putting
together (views.py, status.py), or change anything but by asking for a switch.
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from vipd.proxy import views
from vipd.proxy.config import Config
from vipd.proxy.control import Reader
from vipd.proxy.departures import Departures
from vipd.proxy.errors import ControlError
from vipd.proxy.explain import Explanation
from vipd.proxy.follow import follow
from vipd.proxy.question import question
from vipd.proxy.sources.manifests import ManifestSource
from vipd.proxy.status import Status, SwitchReport, judged
from vipd.proxy.switch import LONGEST_DRAIN_SECONDS
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync
from vipd.proxy.version import VERSION


class SwitchRequest(Struct, frozen=True):
    """The argument of the request `switch`; `drain_seconds` None is the configured time."""

    mode: str
    drain_seconds: Annotated[float, Meta(ge=0, le=LONGEST_DRAIN_SECONDS)] | None = None
    force: bool = False


class Answers:
    """Reads the running daemon for whoever asks on the control socket."""

    def __init__(
        self,
        config: Config,
        sync: Sync,
        switching: Switching,
        departures: Departures,
        source: ManifestSource,
        started: float,
    ) -> None:
        self._config = config
        self._sync = sync
        self._switching = switching
        self._departures = departures
        self._source = source
        self._started = started

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
        }

    async def status(self, _: str = "") -> Status:
        """Return how the daemon is. The pure work is done off the event loop."""
        sync, switching = self._sync, self._switching
        table, serving = sync.table, switching.serving
        servers, endpoints = await asyncio.to_thread(views.counts, table)
        notes = await asyncio.to_thread(views.notes, sync.snapshot, table, self._config.node)
        said = Status(
            version=VERSION,
            pid=os.getpid(),
            mode=serving.mode,
            node=self._config.node.node_name,
            manifests=self._config.manifests,
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
            rejected=tuple(f"{key}: {error}" for key, error in serving.rejected.items()),
            notes=notes,
            passed_over=views.passed_over(self._source.passed_over),
            why_mode=switching.why,
            switch=switching.report,
            trouble=(*switching.draining.failures.values(), *filter(None, [switching.trouble()])),
            drains=switching.drains(),
            departed=self._departures.pending,
            flows_cut=switching.draining.flows_cut + self._departures.flows_cut,
        )
        return judged(said)

    async def services(self, _: str = "") -> list[views.VirtualServerView]:
        """Return every virtual server."""
        return await asyncio.to_thread(views.services, self._sync.table.virtual_servers())

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
        return views.settings(mode, self._config.node, own, self._config.dataplane)

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
            self._config.node,
            self._config.dataplane,
            serving.mode,
            serving.program,
        )


def _request(argument: str) -> SwitchRequest:
    try:
        return msgspec.json.decode(argument, type=SwitchRequest)
    except msgspec.DecodeError as error:
        raise ControlError(f"request not understood: {error}") from error
