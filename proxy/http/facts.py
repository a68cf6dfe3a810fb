"""What the health of a running daemon is concluded from.

Lives here: where each fact is found. Must not: conclude anything (health.py does).
"""

import os
import time
from collections.abc import Sequence

from vipd.proxy.http.health import Facts, Health, is_eligible
from vipd.proxy.names import Family
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync


def health(sync: Sync, switching: Switching, *, from_cluster: bool) -> Health:
    """Return who says how this node is; `from_cluster`: a node without a Node object is gone."""

    def facts() -> Facts:
        serving = switching.serving
        return Facts(
            waiting_since=serving.waiting_since,
            updated_at=None if serving.last_sync is None else serving.last_sync.at,
            eligible=is_eligible(
                sync.snapshot,
                sync.settings.node_name,
                listed=sync.listed,
                from_cluster=from_cluster,
            ),
        )

    return Health(facts, _families(), time.monotonic, time.time)


def _families() -> Sequence[Family]:
    """Return the IP families of this host; without IPv6 there is no such file."""
    return tuple(Family) if os.path.exists("/proc/net/if_inet6") else (Family.IPV4,)
