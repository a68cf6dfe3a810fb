"""What upstreams have said, as long as it may be said again: bounded in bytes.

Lives here: what is kept, for how long, and what is given of it. Pure; times are seconds on one
clock, passed in. Must not: decide who makes room (shares.py), or whether to wait for a fresh reply
(forwarder.py).
"""

from collections.abc import Collection, Iterable
from itertools import chain
from math import inf

from vipd.dns.forward import wire
from vipd.dns.forward.got import Got
from vipd.dns.forward.question import Reply
from vipd.dns.forward.settings import CacheSettings
from vipd.dns.forward.shares import Kept, Share

REFRESH_SHARE = 0.9
"""Of the time that a reply has; unbound's."""
_KEY_END = 3
"""Type and flags, behind the name."""


class Entry(Kept):
    """One reply. Its TTLs are lowered when it is given, at most once a second."""

    __slots__ = (
        "_aged_at",
        "_offsets",
        "_run",
        "_turn",
        "expires",
        "extended_error",
        "message",
        "recheck",
        "refresh_at",
        "target",
        "ttl",
    )

    def __init__(self, key: bytes, reply: Reply, ttl: int, now: float) -> None:
        self.message = reply.message
        self.ttl = ttl
        self.expires = now + ttl
        self.recheck = 0.0
        """Behind its end: until when a fresh reply is not asked for, as the last try failed."""
        self.refresh_at = now + ttl * REFRESH_SHARE
        """From then on who asks makes it be asked for again; infinite once it was."""
        self.extended_error = reply.extended_error
        self.target = reply.target
        found = list(wire.records(reply.message))
        self._offsets = wire.ttl_offsets(found)
        self._run = wire.address_run(found)
        self._turn = 0
        self._aged_at = int(now)
        super().__init__(key, len(reply.message) + len(self._offsets))

    def got(self, now: float) -> Got:
        """Return it for a client: TTLs of now, addresses in turn."""
        seconds = int(now) - self._aged_at
        if seconds > 0:
            self.message = wire.aged(self.message, self._offsets, seconds)
            self._aged_at += seconds
        if self._run is None:
            return Got(self.message, self.extended_error)
        self._turn += 1
        return Got(wire.turned(self.message, self._run, self._turn), self.extended_error)

    def stale(self, ttl: int) -> Got:
        """Return it behind its end, with this TTL."""
        return Got(wire.with_ttl(self.message, self._offsets, ttl), wire.EDE_STALE)


class Cache:
    """Replies by the key of their question (`key_of`)."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.success = Share(0)
        """Replies with records."""
        self.denial = Share(0)
        """Denials and failures."""
        self._entries: dict[bytes, Entry] = {}
        self.configure(settings)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held_bytes(self) -> int:
        """Memory of all entries."""
        return self.success.bytes + self.denial.bytes

    def configure(self, settings: CacheSettings) -> None:
        """Go on with other settings; what is too much for them goes."""
        self.settings = settings
        denials = int(settings.most_bytes * settings.denial_share)
        gone = self.denial.resize(denials), self.success.resize(settings.most_bytes - denials)
        self._forget(chain(*gone))

    def fresh(self, key: bytes, now: float) -> Entry | None:
        """Return the entry whose time is not over; it was used then."""
        entry = self._entries.get(key)
        if entry is None or now >= entry.expires:
            return None
        if entry.share is not None:
            entry.share.used(entry)
        return entry

    def stale(self, key: bytes, now: float) -> Entry | None:
        """Return the positive entry whose time is over but not for long (RFC 8767)."""
        entry = self._entries.get(key)
        return entry if entry is not None and self._is_stale(entry, now) else None

    def refresh_is_due(self, entry: Entry, now: float) -> bool:
        """Return whether a fresh entry that was asked for should be asked for again: True once."""
        if now < entry.refresh_at or entry.share is not self.success:
            return False
        entry.refresh_at = inf
        return self.settings.prefetch

    def put(self, key: bytes, reply: Reply, now: float) -> None:
        """Keep a reply, if it may be kept. A failure never replaces what may be given stale."""
        old = self._entries.get(key)
        ttl = reply.ttl
        if reply.rcode == wire.SERVFAIL:
            if old is not None and old.share is self.success and now < self._stale_until(old):
                old.recheck = now + self.settings.stale_recheck_seconds
                return
            ttl = self._failure_ttl(old, ttl, now)
        was_used = old is not None and old.is_established
        if old is not None:
            self._remove(old)
        if ttl > 0 and self.settings.most_bytes > 0:
            entry = Entry(key, reply, ttl, now)
            entry.is_failure = reply.rcode == wire.SERVFAIL
            share = self.denial if reply.is_denial or entry.is_failure else self.success
            self._entries[key] = entry
            self._forget(share.add(entry))
            if was_used and entry.share is not None:
                share.used(entry)

    def drop_below(self, domains: Collection[bytes]) -> None:
        """Forget all names that are in these domains; it takes time for each entry."""
        wanted = frozenset(domains)
        for key, entry in list(self._entries.items()):
            if not wanted.isdisjoint(wire.suffixes(key[:-_KEY_END])):
                self._remove(entry)

    def _failure_ttl(self, old: Entry | None, ttl: int, now: float) -> int:
        most = self.settings.most_failure_ttl
        if ttl > 0 and old is not None and old.is_failure and now < old.expires + 2 * most:
            ttl = 2 * old.ttl
        return min(ttl, most)

    def _is_stale(self, entry: Entry, now: float) -> bool:
        return entry.share is self.success and entry.expires <= now < self._stale_until(entry)

    def _stale_until(self, entry: Entry) -> float:
        return entry.expires + self.settings.stale_seconds

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        if entry.share is not None:
            entry.share.remove(entry)

    def _forget(self, gone: Iterable[Kept]) -> None:
        for one in gone:
            del self._entries[one.key]
