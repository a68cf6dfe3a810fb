"""What bounds the TCP forwarder, and what it counts.

Lives here: constants with their reasons, as values that tests and settings can change. Must not:
know sockets.
"""

from msgspec import Struct


class TcpLimits(Struct, frozen=True, kw_only=True):
    """Bounds of one worker."""

    most: int = 30_000
    """Connections at once, those that are not yet established included. Beyond, accept is paused:
    clients wait in the listeners' queues."""
    of_client: float = 0.5
    """The share that one client address may have of the most there can be, rounded up; its further
    connections are reset. Few descriptors change nothing: one client must not take all."""
    attempts: int = 4
    """Endpoints that a connection is tried at, as kube-proxy's userspace mode did."""
    connect_seconds: float = 1.0
    """How long an endpoint may take to answer: one lost SYN is sent again after a second."""
    accepts_at_once: int = 16
    """Of one listener, before the others have their turn."""
    pause_seconds: float = 0.1
    """How long accept is paused for lack of descriptors or memory, unless some are freed."""
    quiet_seconds: float = 10.0
    """A shortage within this time of the last one is the same episode, and not logged again."""
    most_held: int = 64 << 20
    """Bytes held for slow receivers before reads become small for everyone."""
    most_pipes: int = 16
    """Pipes for long streams; each takes two descriptors. Beyond, long streams are copied."""


class TcpCounters:
    """What one forwarder has counted since it began."""

    __slots__ = (
        "accept_paused",
        "accepted",
        "connect_failed",
        "cut",
        "denied",
        "ended",
        "failed_inside",
        "no_local_port",
        "not_connected",
        "over_share",
        "refused",
        "reset",
    )

    def __init__(self) -> None:
        self.accepted = 0
        """Connections taken from the kernel; each is counted once more below when it is over."""
        self.ended = 0
        """Ended in order, in both directions."""
        self.reset = 0
        """Reset by one side, or lost, and passed on as a reset."""
        self.cut = 0
        """Reset because they were to be cut."""
        self.refused = 0
        """Reset because no endpoint could be reached."""
        self.denied = 0
        """Reset because the source is not allowed."""
        self.over_share = 0
        """Reset because their client had its share of all connections already."""
        self.failed_inside = 0
        """Reset because of an error of this program, which is in the log."""
        self.connect_failed = 0
        """Attempts that an endpoint refused or did not answer in time."""
        self.no_local_port = 0
        """Attempts for which no local port was left towards the endpoint."""
        self.not_connected = 0
        """Attempts that this node's kernel refused, for lack of memory or by a rule."""
        self.accept_paused = 0
        """How often accept was paused: too few descriptors or memory, or the most connections."""

    def by_name(self) -> dict[str, int]:
        """Return the counters under their names, which begin with ``tcp_``."""
        return {f"tcp_{name}": getattr(self, name) for name in self.__slots__}
