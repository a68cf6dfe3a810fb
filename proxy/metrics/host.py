"""What the kernel says of connection tracking as a whole.

Lives here: reading /proc. Must not: list flows (backends/conntrack.py).
"""

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_LOST = Path("/proc/thread-self/net/stat/nf_conntrack")
_WHY = ("drop", "early_drop", "insert_failed")


class Tracking(Struct, frozen=True):
    """How full the table is, and what it lost."""

    entries: int
    limit: int
    lost: Mapping[str, int]
    """By the kernel's names: ``drop``, ``early_drop``, ``insert_failed``."""


def tracking() -> Tracking | None:
    """Return how connection tracking is; None where there is none."""
    try:
        entries, limit = int(_COUNT.read_text()), int(_LIMIT.read_text())
    except (OSError, ValueError):
        return None
    try:
        return Tracking(entries, limit, lost(_LOST.read_text()))
    except (OSError, ValueError):
        return Tracking(entries, limit, {})


def lost(text: str) -> dict[str, int]:
    """Return the sums over processors of what was lost.

    Format: ct_cpu_seq_show() in net/netfilter/nf_conntrack_standalone.c: a line of names, and one
    of hexadecimal numbers for each processor.
    """
    names, *lines = (line.split() for line in text.splitlines())
    return {
        why: sum(int(line[names.index(why)], 16) for line in lines) for why in _WHY if why in names
    }
