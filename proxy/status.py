"""What the daemon says of itself: the record behind `vipd status` and the health that it implies.

Lives here: the record, its JSON shape and what counts as degraded. Must not: measure anything.
"""

from msgspec import Struct, structs


class LastSync(Struct, frozen=True):
    """One sync that was committed. Times are seconds since the epoch and milliseconds."""

    at: float
    milliseconds: float
    virtual_servers: int
    """Virtual servers that the sync changed."""
    objects: int
    """Kernel objects that it added or removed."""
    full: bool
    """Whether the kernel was observed first (start, repair), or only a change was planned."""


class Status(Struct, frozen=True, kw_only=True):
    """State of a daemon. Lists hold sentences that name their object; empty lists are good news."""

    version: str
    pid: int
    mode: str
    node: str
    manifests: tuple[str, ...]
    started: float
    synced: bool
    """Whether everything that the source knew at the start has been programmed."""
    services: int
    virtual_servers: int
    endpoints: int
    """Endpoints of virtual servers, each counted once for each it serves."""
    syncs: int
    failed_syncs: int
    last_sync: LastSync | None
    failure: str
    """Why the last sync failed and is tried again; empty when it did not."""
    problems: tuple[str, ...]
    """Objects and files that could not be read."""
    conflicts: tuple[str, ...]
    """Addresses that two services claim."""
    rejected: tuple[str, ...]
    """Virtual servers that the kernel refused."""
    notes: tuple[str, ...]
    """What is legal but seldom meant, such as a node name that no Node object has."""
    passed_over: tuple[str, ...]
    """Kinds of objects that vipd has no use for, with their number."""

    degraded: bool = False
    """Whether something that an operator should look at keeps some service from being served:
    filled in by `judged`."""


def judged(status: Status) -> Status:
    """Return the status with `degraded` filled in."""
    bad = (status.failure, status.problems, status.conflicts, status.rejected)
    return structs.replace(status, degraded=not status.synced or any(bad))
