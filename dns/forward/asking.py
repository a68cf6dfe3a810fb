"""The questions under way, and the upstreams they go to.

Lives here: equal questions made one, bounds, and what is known of upstreams while they are
configured. Must not: know what is cached, or which upstreams a name has (routes.py).
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from msgspec import structs

from vipd.dns.forward.counters import Counters, Labels, Sample
from vipd.dns.forward.course import Course
from vipd.dns.forward.excerpt import Rules
from vipd.dns.forward.fetch import Fetch, Surroundings
from vipd.dns.forward.group import Group
from vipd.dns.forward.question import Question, Reply
from vipd.dns.forward.settings import Policy
from vipd.dns.forward.standing import CLIENT_COOKIE_BYTES, Standing
from vipd.dns.forward.tcp import TcpLinks
from vipd.dns.forward.upstream import Upstream
from vipd.dns.forward.wire import RandomBits


class Asking:
    """Upstreams and the questions they are asked."""

    def __init__(
        self, rules: Rules, clock: Callable[[], float], bits: RandomBits, counters: Counters
    ) -> None:
        self.rules = rules
        """May be replaced; what is under way goes on by the old ones."""
        self._standings: dict[Upstream, Standing] = {}
        self._links: dict[Upstream, TcpLinks] = {}
        self._under_way: dict[Question, Fetch] = {}
        self._of_client: Counter[str] = Counter()
        """How many of them each client began."""
        self._open: set[Fetch] = set()
        """Those whose sockets are not all closed."""
        self._closing: set[asyncio.Task[None]] = set()
        self.counters = counters
        self._bits = bits
        self._tasks: set[asyncio.Task[None]] = set()
        self._around = Surroundings(clock, bits, counters, self._links, asyncio.Lock(), self._tasks)

    def __len__(self) -> int:
        return len(self._under_way)

    # Upstreams

    def standing(self, upstream: Upstream) -> Standing:
        """Return what is known of an upstream, from now on."""
        if upstream not in self._standings:
            cookie = self._bits(8 * CLIENT_COOKIE_BYTES).to_bytes(CLIENT_COOKIE_BYTES, "big")
            self._standings[upstream] = Standing(upstream, self.rules.settings, cookie)
            self._links[upstream] = TcpLinks(upstream, self.rules.settings, self.counters)
        return self._standings[upstream]

    def standings(self) -> Iterable[Standing]:
        """Return what is known of all of them."""
        return self._standings.values()

    def keep(self, upstreams: set[Upstream]) -> None:
        """Forget all others. What is under way with them fails over to others that it knows."""
        gone = self._standings.keys() - upstreams
        for one in gone:
            del self._standings[one]
        self.counters.forget({str(one) for one in gone})
        for standing in self._standings.values():
            standing.settings = self.rules.settings
            self._links[standing.upstream].settings = self.rules.settings
        for one in gone:
            self._closing.update(self._links.pop(one).close())
        self._closing = {one for one in self._closing if not one.done()}

    # Questions

    def ask(
        self,
        question: Question,
        group: Group,
        done: Callable[[Question, Reply], None],
        client: str | None = None,
    ) -> Fetch | None:
        """Return the question under way, begun now if it was not; None where there are too many.

        `done` is called with the reply before anybody who waits for it goes on. It counts as one of
        `client`, if there is one, until the reply is there, whoever waits for it meanwhile.
        """
        fetch = self._under_way.get(question)
        if fetch is not None:
            if fetch.waiters >= self.rules.settings.waiters:
                return None
            self.counters.coalesced += 1
            fetch.waiters += 1
            return fetch
        if len(self._under_way) >= self.rules.settings.questions or group.is_full:
            return None
        if client is not None:
            if self._of_client[client] >= self.rules.settings.questions_of_client:
                return None
            self._of_client[client] += 1
        self.counters.all_down += bool(group.members) and group.all_down
        course = Course(question, group, self.rules.settings, self._bits)
        rules = self.rules._replace(refuse_private=group.refuses_private)
        fetch = self._under_way[question] = self._fetch(question, course, rules)
        fetch.waiters = 1

        def finished(reply: asyncio.Future[Reply]) -> None:
            self._under_way.pop(question, None)
            if client is not None:
                self._of_client[client] -= 1
                if not self._of_client[client]:
                    del self._of_client[client]
            done(question, reply.result())

        fetch.reply.add_done_callback(finished)
        fetch.begin()
        return fetch

    def probe(self, question: Question, upstream: Upstream) -> Fetch:
        """Ask one upstream, once, whatever is known of it and without learning from it."""
        settings = structs.replace(
            self.rules.settings,
            attempts=1,
            question_seconds=self.rules.settings.most_timeout_seconds,
        )
        standing = Standing(upstream, settings, self.standing(upstream).client_cookie)
        group = Group([standing], Policy.IN_ORDER)
        course = Course(question, group, settings, self._bits)
        fetch = self._fetch(question, course, self.rules)
        fetch.begin()
        return fetch

    def _fetch(self, question: Question, course: Course, rules: Rules) -> Fetch:
        fetch = Fetch(question, course, rules, self._around, self._open.discard)
        self._open.add(fetch)
        return fetch

    async def close(self) -> None:
        """Give up all questions: who waits gets a failure."""
        for fetch in list(self._open):
            fetch.close()
        self._open.clear()
        for task in list(self._tasks):
            task.cancel()
        for links in self._links.values():
            self._closing.update(links.close())
        await asyncio.gather(*self._tasks, *self._closing, return_exceptions=True)

    def samples(self) -> Iterator[Sample]:
        """Yield what is known of upstreams, and what is under way."""
        yield Sample("vipd_dns_forward_questions", (), len(self._under_way))
        for standing in self._standings.values():
            to: Labels = (("proxy_name", "forward"), ("to", str(standing.upstream)))
            yield Sample("coredns_proxy_healthcheck_failures_total", to, standing.went_down)
            yield Sample("vipd_dns_forward_upstream_down", to, standing.is_down)
            yield Sample("vipd_dns_forward_upstream_looping", to, standing.looping)
            yield Sample("vipd_dns_forward_upstream_in_flight", to, standing.in_flight)
            if standing.smoothed is not None:
                seconds = standing.smoothed
                yield Sample("vipd_dns_forward_upstream_round_trip_seconds", to, seconds)
