"""Settings of the kernel that belong to no dataplane: connection tracking's, and the OOM score.

Lives here: which ones a configuration means, and trying to make them so. Must not: end anything. In
a container /proc may be read-only, and outside of the first network namespace some of these belong
to the host (nf_conntrack_max since Linux 5.12, the hash table): what is refused is told, once.

What kube-proxy sets (pkg/proxy/conntrack/sysctls.go, v1.36), but that the table is never made
smaller than it is. Nothing is taken back at the end: other flows of the node depend on it.
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import structlog

from vipd.backends import conntrack_messages
from vipd.proxy.settings import ConntrackSettings

ROOT = Path("/")
_SYSCTLS = "proc/sys/net/netfilter/nf_conntrack"
_HASH_SIZE = "sys/module/nf_conntrack/parameters/hashsize"
_OOM_SCORE = "proc/self/oom_score_adj"
_ENTRIES_PER_BUCKET = 4

log = structlog.get_logger()


class KernelSettings:
    """Tries to make the kernel's settings those of the configuration; None: left alone."""

    def __init__(self, conntrack: ConntrackSettings | None, oom_score: int | None) -> None:
        self.refused: tuple[str, ...] = ()
        """Sentences about what could not be set."""
        self._conntrack = conntrack
        self._oom_score = oom_score

    async def run(self) -> None:
        """Try, then wait until cancelled."""
        await self._try()
        await asyncio.Event().wait()

    async def change(self, conntrack: ConntrackSettings | None, oom_score: int | None) -> None:
        """Try what the configuration says now."""
        self._conntrack, self._oom_score = conntrack, oom_score
        await self._try()

    async def _try(self) -> None:
        before, self.refused = self.refused, await asyncio.to_thread(self._apply)
        for one in self.refused:
            if one not in before:
                log.warning("kernel setting refused", why=one)

    def _apply(self) -> tuple[str, ...]:
        refused = apply(self._conntrack) if self._conntrack is not None else ()
        if self._oom_score is not None:
            refused += adjust_oom_score(self._oom_score)
        return refused


def apply(settings: ConntrackSettings, root: Path = ROOT) -> tuple[str, ...]:
    """Set what connection tracking has otherwise; return a sentence for what could not be set."""
    if not (root / f"{_SYSCTLS}_max").exists():
        _load()
    return tuple(_applied(settings, root))


def adjust_oom_score(score: int, root: Path = ROOT) -> tuple[str, ...]:
    """Let the kernel end this process sooner or later than others when memory is short.

    -1000 to 1000 (proc_pid_oom_score_adj(5)). Return a sentence where it cannot be set.
    """
    return tuple(_set(root / _OOM_SCORE, score, "oom_score_adj"))


def _applied(settings: ConntrackSettings, root: Path) -> Iterator[str]:
    most = 0
    if settings.max_per_core:
        most = max(settings.max_per_core * (os.cpu_count() or 1), settings.min)
        yield from _set(root / f"{_SYSCTLS}_max", most, _name("max"), at_least=True)
        buckets = most // _ENTRIES_PER_BUCKET
        name = "hashsize of nf_conntrack"
        yield from _set(root / _HASH_SIZE, buckets, name, at_least=True)
    wanted = {
        "tcp_timeout_established": settings.tcp_established_seconds,
        "tcp_timeout_close_wait": settings.tcp_close_wait_seconds,
        "tcp_be_liberal": int(settings.tcp_be_liberal),
        "udp_timeout": settings.udp_seconds,
        "udp_timeout_stream": settings.udp_stream_seconds,
    }
    for name, value in wanted.items():
        if value:
            yield from _set(root / f"{_SYSCTLS}_{name}", value, _name(name))


def _name(last: str) -> str:
    return f"net.netfilter.nf_conntrack_{last}"


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
