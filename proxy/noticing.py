"""Looks at the daemon now and then, and tells the source what those who run the cluster should see.

Lives here: when it is looked. Must not: decide what is told (notices.py), or be on the way of any
commit: nothing calls it, it looks by itself.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import structlog

from vipd.proxy.errors import DataplaneError
from vipd.proxy.http.service import HttpService
from vipd.proxy.notice import Notice
from vipd.proxy.notices import AGAIN_SECONDS, Holding, Seen, holding, started, switched
from vipd.proxy.status import SwitchReport
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync
from vipd.proxy.version import VERSION

LOOK_SECONDS = 5.0
"""What comes and goes within it is not told."""
GOES_ON_SECONDS = 600.0
"""So long after the last repair a party still counts as one that goes on."""

log = structlog.get_logger()


class Noticing:
    """Tells what there is to notice, by `tell`, which never waits."""

    def __init__(
        self, sync: Sync, switching: Switching, http: HttpService, tell: Callable[[Notice], None]
    ) -> None:
        self._sync, self._switching, self._http = sync, switching, http
        self._tell = tell
        self._node = sync.settings.node_name
        self._holding = Holding()
        self._started = False
        self._failing_since: float | None = None
        self._switch_told: SwitchReport | None = None
        self._left: Sequence[str] = ()
        self._looked_for_left: float | None = None

    async def run(self) -> None:
        """Look when everything is programmed, or soon, and then until cancelled."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await self._switching.serving.in_step.wait()
        while True:
            await self._look_for_leftovers(time.monotonic())
            self.look(time.monotonic())
            await asyncio.sleep(LOOK_SECONDS)

    def look(self, now: float) -> None:
        """Tell what is new. `now` in seconds that never go back."""
        serving, report = self._switching.serving, self._switching.report
        if serving.synced and not self._started:
            self._started = True
            self._tell(started(self._node, VERSION, serving.mode, self._switching.why))
        if report is not None and report.ended is not None and report is not self._switch_told:
            self._switch_told = report
            self._tell(switched(self._node, report))
        if not serving.failure:
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = now
        failing = 0.0 if self._failing_since is None else now - self._failing_since
        for notice in self._holding.due(holding(self._seen(), failing), now):
            self._tell(notice)

    def _seen(self) -> Seen:
        serving, repairs = self._switching.serving, self._switching.repairs
        goes_on = time.time() - repairs.last_at < GOES_ON_SECONDS
        return Seen(
            node=self._node,
            mode=serving.mode,
            table=self._sync.table,
            problems=self._sync.problems,
            rejected=serving.rejected,
            failure=serving.failure,
            going_on=repairs.waiting() if goes_on else {},
            left_by_kube_proxy=tuple(self._left),
            failed_ports=self._http.failed_ports(),
        )

    async def _look_for_leftovers(self, now: float) -> None:
        """Look once when everything is programmed, and as long as there are some, now and then.

        Not at once: the daemon may be about to remove them itself (handover.py).
        """
        looked = self._looked_for_left
        if not self._started or (looked is not None and not self._left):
            return
        if looked is not None and now - looked < AGAIN_SECONDS:
            return
        from vipd.backends import kube_proxy

        self._looked_for_left = now
        try:
            self._left = await kube_proxy.at_a_glance()
        except (DataplaneError, OSError) as error:
            log.debug("not known whether kube-proxy left anything", why=str(error))
