"""Settings of the kernel that belong to no dataplane: connection tracking's, and the OOM score.

Lives here: which ones a configuration means, and trying to make them so. Must not: end anything. In
a container /proc may be read-only, and outside of the first network namespace some of these belong
to the host (nf_conntrack_max since Linux 5.12, the hash table): what is refused is told, once.

What kube-proxy sets (pkg/proxy/conntrack/sysctls.go, v1.36), but that the table is never made
smaller than it is. Nothing is taken back at the end: other flows of the node depend on it. What is
not configured any more while the daemon runs gets back the value that the daemon found, but for
sizes, and for what somebody has changed since.
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import structlog

from vipd.backends import conntrack_messages, sysctl
from vipd.proxy.settings import ConntrackSettings

_NAME = "net/netfilter/nf_conntrack_"
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_ENTRIES_PER_BUCKET = 4
_NOTHING = ConntrackSettings(
    max_per_core=0, min=0, tcp_established_seconds=0, tcp_close_wait_seconds=0
)

log = structlog.get_logger()


class _Found(NamedTuple):
    """What a sysctl was before this process wrote it, and what was written."""

    before: str
    ours: str


Found = dict[str, _Found]


class KernelSettings:
    """Tries to make the kernel's settings those of the configuration; None: left alone."""

    def __init__(self, conntrack: ConntrackSettings | None, oom_score: int | None) -> None:
        self.refused: tuple[str, ...] = ()
        """Sentences about what could not be set."""
        self.conntrack = conntrack
        """What is configured now."""
        self.oom_score = oom_score
        """The same."""
        self._found: Found = {}

    async def run(self) -> None:
        """Try, then wait until cancelled."""
        await self._try()
        await asyncio.Event().wait()

    async def change(self, conntrack: ConntrackSettings | None, oom_score: int | None) -> None:
        """Try what the configuration says now."""
        self.conntrack, self.oom_score = conntrack, oom_score
        await self._try()

    async def _try(self) -> None:
        before, self.refused = self.refused, await asyncio.to_thread(self._apply)
        for one in self.refused:
            if one not in before:
                log.warning("kernel setting refused", why=one)

    def _apply(self) -> tuple[str, ...]:
        refused: tuple[str, ...] = ()
        if self.conntrack is not None or self._found:
            refused += apply(self.conntrack or _NOTHING, found=self._found)
        if self.oom_score is not None:
            refused += adjust_oom_score(self.oom_score)
        return refused


def apply(
    settings: ConntrackSettings, root: Path | None = None, found: Found | None = None
) -> tuple[str, ...]:
    """Set what connection tracking has otherwise; return a sentence for what could not be set.

    `root`: the folder that stands for /proc/sys; None: the host's where that is mounted. `found`
    keeps what was there before, for when a setting is not wanted any more.
    """
    root = sysctl.here() if root is None else root
    if not (root / f"{_NAME}max").exists():
        _load()
    return tuple(_applied(settings, root, {} if found is None else found))


def adjust_oom_score(score: int, path: Path = _OOM_SCORE) -> tuple[str, ...]:
    """Let the kernel end this process sooner or later than others when memory is short.

    -1000 to 1000 (proc_pid_oom_score_adj(5)). Return a sentence where it cannot be set.
    """
    return tuple(_set(path, score, "oom_score_adj"))


def _applied(settings: ConntrackSettings, root: Path, found: Found) -> Iterator[str]:
    if settings.max_per_core:
        most = max(settings.max_per_core * (os.cpu_count() or 1), settings.min)
        # The sysctl of the hash table, and not the parameter of the module: a container without
        # privileges has its /sys read-only, and the host's /proc/sys/net mounted.
        for name, value in (("max", most), ("buckets", most // _ENTRIES_PER_BUCKET)):
            yield from _set(root / f"{_NAME}{name}", value, _dotted(name), at_least=True)
    wanted = {
        "tcp_timeout_established": settings.tcp_established_seconds,
        "tcp_timeout_close_wait": settings.tcp_close_wait_seconds,
        "tcp_be_liberal": int(settings.tcp_be_liberal),
        "udp_timeout": settings.udp_seconds,
        "udp_timeout_stream": settings.udp_stream_seconds,
    }
    for name, value in wanted.items():
        path = root / f"{_NAME}{name}"
        if value:
            before = found[name].before if name in found else _get(path)
            found[name] = _Found(before, str(value))
            yield from _set(path, value, _dotted(name))
        elif name in found and _get(path) == found[name].ours and found[name].before:
            yield from _set(path, int(found.pop(name).before), _dotted(name))


def _get(path: Path) -> str:
    """Return what a setting is; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _dotted(name: str) -> str:
    return f"{_NAME}{name}".replace("/", ".")


def _set(path: Path, value: int, name: str, *, at_least: bool = False) -> Iterator[str]:
    """Write a value where there is another one; yield why that cannot be done."""
    now = ""
    try:
        now = path.read_text().strip()
        if now.lstrip("-").isdecimal() and (int(now) == value or (at_least and int(now) > value)):
            return
        path.write_text(str(value))
    except FileNotFoundError:
        yield f"{name} is not set to {value}: there is no such setting here"
    except OSError as error:
        yield f"{name} stays {now or 'unknown'} instead of {value}: {error.strerror}"


def _load() -> None:
    """Let the kernel load connection tracking, as far as this process may."""
    try:
        next(conntrack_messages.dump(socket.AF_INET, b""), None)
    except OSError:
        return  # the settings that are missing tell
