"""Names that are not the cluster's: the one place where they are asked for.

Lives here: the way of a question past what is known here, what is cached and what is under way, to
an upstream. Must not: know clients, how an upstream is asked (fetch.py), or files (upkeep.py).

All methods belong to the thread of the event loop. Nothing raises because of what names, upstreams
or the network do.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from vipd.dns.forward import wire
from vipd.dns.forward.asking import Asking
from vipd.dns.forward.cache import Cache, Entry
from vipd.dns.forward.configured import Configured, Files, Note, OwnAddress, configure
from vipd.dns.forward.counters import Counters, Sample
from vipd.dns.forward.excerpt import Rules
from vipd.dns.forward.got import Got
from vipd.dns.forward.group import Group
from vipd.dns.forward.loops import Loops
from vipd.dns.forward.question import Question, Reply, failure, key_of, question_of
from vipd.dns.forward.routes import Plan, Routes, changed
from vipd.dns.forward.settings import ForwardSettings, problems
from vipd.dns.forward.static import Static
from vipd.dns.forward.upkeep import Upkeep, read_files


class Own(NamedTuple):
    """What the zone says of one of its names."""

    message: bytes
    """As `Got.message`."""
    target: bytes | None = None
    """A name outside of the zone, which the CNAMEs in `message` lead to: it has to be asked for."""


OwnZone = Callable[[bytes, int], Own | None]
"""Returns what the zone says of name and type, None where it is not its own."""
_NOBODY = ""
"""The client for whom names in use are asked for before their time is over."""
_NEVER_FORWARDED = frozenset({0, wire.OPT, *range(128, 255)})
"""Types that are no data: meta types (RFC 6895, 3.1), transfers among them, but for ANY."""


class _Found(NamedTuple):
    got: Got
    """Of one source: without anything before it."""
    target: bytes | None = None
    """A name that has to be asked for the rest."""


class Forwarder:
    """Asks others. `start` it before, `close` it after use.

    `is_ours` tells the cluster's names: no upstream is asked for them, nor believed about them.
    `own_zone` answers for them where a CNAME of others leads there. `own` are the addresses that
    this server listens at. Clock (seconds) and lots may be given for tests.
    """

    def __init__(
        self,
        settings: ForwardSettings | None = None,
        *,
        is_ours: Callable[[bytes], bool] = lambda _: False,
        own_zone: OwnZone = lambda _name, _type: None,
        own: Collection[OwnAddress] = (),
        note: Note = lambda event, **facts: None,
        clock: Callable[[], float] = time.monotonic,
        bits: wire.RandomBits = secrets.randbits,
    ) -> None:
        self.settings = settings or ForwardSettings()
        self.counters = Counters()
        self.note = note
        self._is_ours = is_ours
        self._own_zone = own_zone
        self._own = frozenset(own)
        self._clock = clock
        self._loops = Loops(bits)
        self._cache = Cache(self.settings.cache)
        self._asking = Asking(self._rules(), clock, bits, self.counters)
        self._static = Static()
        self._plan: Plan = {}
        self._routes = Routes({}, self.settings, self._asking.standing)
        self._files = Files()
        self._upkeep = Upkeep(self._loops, self._asking, self._reread, note)
        self._hosts_read_at = 0.0
        self._looked_at: tuple[object, ...] = ()
        self._configuring = asyncio.Lock()

    async def start(self) -> None:
        """Read the files and look after them from now on. Raise ValueError for wrong settings."""
        await self.reload(self.settings)

    async def reload(
        self, settings: ForwardSettings, own: Collection[OwnAddress] | None = None
    ) -> None:
        """Go on with other settings; questions under way, and what is cached, stay.

        `own` are the addresses that this server listens at now; None: as before. Raise ValueError
        where settings are wrong: nothing has changed then.
        """
        found = problems(settings)
        if found:
            raise ValueError("; ".join(map(str, found)))
        async with self._configuring:
            self._own = self._own if own is None else frozenset(own)
            files = await asyncio.to_thread(read_files, settings, self._files, self.note)
            await self._configure(settings, files)
            self._upkeep.follow(settings)

    async def close(self) -> None:
        """Give up what is under way: who waits gets SERVFAIL."""
        await self._upkeep.close()
        await self._asking.close()

    # Questions

    def cached(
        self, name: bytes, qtype: int, *, dnssec: bool = False, checking_disabled: bool = False
    ) -> Got | None:
        """Return the reply if nobody has to be asked for it; None: `ask` has to.

        `name` is in wire form and lower case. For the hot path: it takes a few microseconds.
        """
        if name in self._loops.names:
            return self._loops.came_back(name, qtype)
        if name in self._static:
            self.counters.static += 1
            is_whole = self._static.target(name, qtype) is None
            return self._static.find(name, qtype) if is_whole else None
        now = self._clock()
        entry = self._cache.fresh(key_of(name, qtype, dnssec, checking_disabled), now)
        if entry is None or entry.target is not None:
            return None
        return self._hit(entry, now)

    async def ask(
        self,
        name: bytes,
        qtype: int,
        *,
        dnssec: bool = False,
        checking_disabled: bool = False,
        client: str | None = None,
    ) -> Got:
        """Return the reply to a question, from wherever it comes; SERVFAIL where it cannot be had.

        `name` is in wire form and lower case. `client` is who asks: each has its part of what may
        be under way. None is nobody in particular, without such a bound.
        """
        got = self.cached(name, qtype, dnssec=dnssec, checking_disabled=checking_disabled)
        if got is not None:
            return got
        question = Question(name, qtype, dnssec, checking_disabled)
        if qtype in _NEVER_FORWARDED:
            return _refused(question, None)
        if self._is_ours(name):
            self.counters.guarded += 1
            return _refused(question, wire.EDE_NOT_AUTHORITATIVE)
        found = await self._find(question, client)
        return found.got if found.target is None else await self._follow(question, found, client)

    async def _follow(self, question: Question, found: _Found, client: str | None) -> Got:
        """Return the reply with what stands at the end of its CNAMEs."""
        before: list[bytes] = []
        error = found.got.extended_error
        seen, followed = {question.name}, 0
        while found.target is not None:
            followed += wire.aliases(found.got.message)
            if found.target in seen or followed > self.settings.chain:
                return _got(failure(question, wire.EDE_OTHER))
            seen.add(found.target)
            before.append(found.got.message)
            found = await self._tail(question._replace(name=found.target), client)
            error = found.got.extended_error if error is None else error
            if wire.rcode(found.got.message) in (wire.SERVFAIL, wire.REFUSED):
                return _got(failure(question, error))
        return Got(found.got.message, error, tuple(before))

    async def _tail(self, question: Question, client: str | None) -> _Found:
        if not self._is_ours(question.name):
            return await self._find(question, client)
        own = self._own_zone(question.name, question.type)
        if own is None:  # the zone has just become another
            return _Found(_got(failure(question, wire.EDE_OTHER)))
        return _Found(Got(own.message), own.target)

    async def _find(self, question: Question, client: str | None) -> _Found:
        """Return the reply as far as one source has it."""
        got = self._static.find(question.name, question.type)
        if got is not None:
            return _Found(got, self._static.target(question.name, question.type))
        group = self._routes.find(question.name, question.type)
        if isinstance(group, Got):
            self.counters.special += 1
            self.counters.localhost += question.name.endswith(b"\x09localhost\0")
            return _Found(group)
        now = self._clock()
        entry = self._cache.fresh(key_of(*question), now)
        if entry is not None:
            return _Found(self._hit(entry, now), entry.target)
        self.counters.misses += 1
        return await self._from_upstreams(question, group, client)

    async def _from_upstreams(self, question: Question, group: Group, client: str | None) -> _Found:
        now = self._clock()
        stale = self._cache.stale(key_of(*question), now)
        if stale is not None and now < stale.recheck:
            return self._stale(stale)
        fetch = self._asking.ask(question, group, self._keep, client)
        if fetch is None:
            self.counters.rejected += 1
            return self._stale(stale) if stale else _Found(_got(failure(question, wire.EDE_OTHER)))
        try:
            wait = None if stale is None else self.settings.cache.stale_wait_seconds
            await asyncio.wait([fetch.reply], timeout=wait)
        finally:
            fetch.waiters -= 1
        if not fetch.reply.done():
            assert stale is not None, "others wait for as long as it takes"
            return self._stale(stale)
        reply = fetch.reply.result()
        if stale is not None and reply.rcode == wire.SERVFAIL:
            return self._stale(stale)
        return _Found(_got(reply), reply.target)

    def _hit(self, entry: Entry, now: float) -> Got:
        if entry.share is self._cache.success:
            self.counters.hits_success += 1
        else:
            self.counters.hits_denial += 1
        if now >= entry.refresh_at and self._cache.refresh_is_due(entry, now):
            self._refresh(entry)
        return entry.got(now)

    def _refresh(self, entry: Entry) -> None:
        """Ask for what is in use before its time is over. Nobody waits for it."""
        question = question_of(entry.key)
        group = self._routes.find(question.name, question.type)
        if isinstance(group, Group):
            fetch = self._asking.ask(question, group, self._keep, _NOBODY)
            if fetch is not None:
                self.counters.prefetched += 1
                fetch.waiters -= 1

    def _stale(self, entry: Entry) -> _Found:
        self.counters.served_stale += 1
        return _Found(entry.stale(self.settings.cache.stale_ttl), entry.target)

    def _keep(self, question: Question, reply: Reply) -> None:
        self.counters.private += reply.extended_error == wire.EDE_BLOCKED
        self._cache.put(key_of(*question), reply, self._clock())

    # Configuration

    def _rules(self, *, trust_ad: bool = False) -> Rules:
        return Rules(self.settings, self._is_ours, trust_ad)

    async def _configure(self, settings: ForwardSettings, files: Files) -> None:
        # In a thread: a hosts file may have many thousands of lines.
        made = await asyncio.to_thread(configure, settings, files, self._own, self.note)
        if files.hosts != self._files.hosts:
            self._hosts_read_at = time.time()
        self.settings, self._files = settings, files
        self._apply(settings, made)

    def _apply(self, settings: ForwardSettings, configured: Configured) -> None:
        self._asking.rules = self._rules(trust_ad=configured.trust_ad)
        self._static = configured.static
        other = changed(self._plan, configured.plan)
        self._plan = configured.plan
        self._routes = Routes(configured.plan, settings, self._asking.standing)
        groups = [group for _, group in self._routes.groups()]
        upstreams = {one.upstream for group in groups for one in group.members}
        self._asking.keep(upstreams)
        self._cache.configure(settings.cache)
        if other:
            self._cache.drop_below(other)
        looked_at = (upstreams, settings.loop_check)
        if looked_at != self._looked_at:
            self._looked_at = looked_at
            self._upkeep.check_loops(self._routes)

    async def _reread(self) -> None:
        async with self._configuring:
            files = await asyncio.to_thread(read_files, self.settings, self._files, self.note)
            if files != self._files:
                await self._configure(self.settings, files)

    def samples(self) -> Iterator[Sample]:
        """Yield what is counted and measured, under the names of docs/dns.md."""
        yield from self.counters.samples()
        yield from self._asking.samples()
        for kind, share in (("success", self._cache.success), ("denial", self._cache.denial)):
            yield Sample("coredns_cache_entries", (("type", kind),), len(share))
            yield Sample("coredns_cache_evictions_total", (("type", kind),), share.evicted)
            yield Sample("vipd_dns_cache_bytes", (("type", kind),), share.bytes)
        file = (("hostsfile", self.settings.hosts_file),)
        yield Sample("coredns_hosts_entries", file, len(self._files.hosts.hosts))
        yield Sample("coredns_hosts_reload_timestamp_seconds", file, self._hosts_read_at)


def _refused(question: Question, extended_error: int | None) -> Got:
    return Got(wire.reply(question.name, question.type, wire.REFUSED), extended_error)


def _got(reply: Reply) -> Got:
    return Got(reply.message, reply.extended_error)
