"""How this node is: /healthz, /livez, and what health-check node ports say of it.

Lives here: when the proxy counts as healthy and the node as eligible, and the two documents. Pure:
clocks are passed in. Must not: know sockets, or ask the dataplane anything.
Source: pkg/proxy/healthcheck/proxy_health.go of Kubernetes v1.36.

A service that is not served as it should be does not make the node unhealthy: everything else on it
is served, and a load balancer that turned away from it would break that, too.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec
from msgspec import UNSET, Struct, UnsetType

from vipd.proxy.http.answer import JSON, Answer
from vipd.proxy.model import Node
from vipd.proxy.names import Family
from vipd.proxy.snapshot import Snapshot

TIMEOUT_SECONDS = 60.0
"""How long a change may wait for its commit: twice kube-proxy's syncPeriod of 30 s."""
NEVER = "0001-01-01T00:00:00Z"
"""Go's zero time, which kube-proxy tells before the first sync."""


class Facts(Struct, frozen=True):
    """What health is concluded from."""

    waiting_since: float | None
    """Since when a change waits for its commit, by the monotonic clock."""
    updated_at: float | None
    """When the last commit succeeded, in seconds since the epoch."""
    eligible: bool
    """Whether the node is to get new traffic from outside."""


class FamilyHealth(Struct, frozen=True, rename="camel"):
    """``status.IPv4`` and ``status.IPv6``: one commit is of both families, so they are alike."""

    last_updated: str
    healthy: bool


class Document(Struct, frozen=True, rename="camel"):
    """The body of /healthz and /livez; `node_eligible` is in the first only."""

    last_updated: str
    current_time: str
    healthy: bool
    status: dict[str, FamilyHealth]
    node_eligible: bool | UnsetType = UNSET


class Health:
    """Says how this node is. `clock` is monotonic, `now` in seconds since the epoch."""

    def __init__(
        self,
        facts: Callable[[], Facts],
        families: Sequence[Family],
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self._facts = facts
        self._families = families
        self._clock, self._now = clock, now
        self.answers: Counter[tuple[str, int]] = Counter()
        """How often /healthz and /livez were answered, by ``("healthz", 200)``."""

    @property
    def healthy(self) -> bool:
        """Whether no change waits too long for its commit."""
        return self._is_healthy(self._facts())

    def _is_healthy(self, facts: Facts) -> bool:
        since = facts.waiting_since
        return since is None or self._clock() - since < TIMEOUT_SECONDS

    async def healthz(self) -> Answer:
        """Answer whether load balancers should send new traffic to this node."""
        facts = self._facts()
        return self._answer("healthz", facts, facts.eligible, facts.eligible)

    async def livez(self) -> Answer:
        """Answer whether the proxy works: a node that is being deleted still has one that does."""
        return self._answer("livez", self._facts(), True, UNSET)

    def _answer(
        self, name: str, facts: Facts, eligible: bool, told_eligible: bool | UnsetType
    ) -> Answer:
        healthy = self._is_healthy(facts)
        good = healthy and eligible
        now = rfc3339(self._now())
        updated = NEVER if facts.updated_at is None else rfc3339(facts.updated_at)
        document = Document(
            # Of a healthy proxy, kube-proxy tells the present; so did its older versions.
            last_updated=now if good else updated,
            current_time=now,
            healthy=healthy,
            status={str(one): FamilyHealth(updated, healthy) for one in self._families},
            node_eligible=told_eligible,
        )
        status = 200 if good else 503
        self.answers[name, status] += 1
        return Answer(msgspec.json.encode(document), JSON, status)


def is_eligible(snapshot: Snapshot, node_name: str, *, listed: bool, from_cluster: bool) -> bool:
    """Return whether a node is to get new traffic from outside.

    Before the first list is complete nothing speaks against it. Manifests without any Node object
    say nothing of nodes; an API server that has none of this name says that it is gone.
    """
    if not listed or not (from_cluster or snapshot.nodes):
        return True
    node: Node | None = snapshot.nodes.get(node_name)
    return node is not None and not node.leaving


def rfc3339(seconds: float) -> str:
    """Return a moment since the epoch as the Kubernetes API writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
