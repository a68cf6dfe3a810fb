"""Questions that wait for upstreams: how many there may be, and how they become replies.

Lives here: the bounds in total and of each client, and the one way to forward, for UDP and TCP.
Must not: know how upstreams are asked (forward/).
"""

from typing import Protocol

from vipd.dns.answer import Answers, Forward
from vipd.dns.forward.got import Got
from vipd.dns.server.counters import Counters


class Asks(Protocol):
    """Whoever asks upstreams; it never raises for reasons of the network."""

    def cached(
        self, name: bytes, qtype: int, *, dnssec: bool = False, checking_disabled: bool = False
    ) -> Got | None:
        """Return a whole reply if nobody has to be asked for it."""

    async def ask(
        self,
        name: bytes,
        qtype: int,
        *,
        dnssec: bool = False,
        checking_disabled: bool = False,
        client: str | None = None,
    ) -> Got:
        """Return a whole reply; `client` has its part of what may be asked at a time."""


class Waiting:
    """The questions of all clients of this process that wait."""

    def __init__(self, most: int, most_of_client: int, counters: Counters) -> None:
        self.most, self.most_of_client = most, most_of_client
        self.count = 0
        self._of: dict[str, int] = {}
        self._counters = counters

    def admit(self, client: str) -> bool:
        """Take in one more question of a client, to be released; return whether there was room."""
        of_client = self._of.get(client, 0)
        if self.count >= self.most or of_client >= self.most_of_client:
            self._counters.by_name["too_many_waiting"] += 1
            return False
        self.count += 1
        self._of[client] = of_client + 1
        return True

    def release(self, client: str) -> None:
        """Make room again."""
        self.count -= 1
        left = self._of[client] - 1
        if left:
            self._of[client] = left
        else:
            del self._of[client]

    def at_once(
        self, forward: Forward, answers: Answers, asks: Asks | None, *, udp: bool
    ) -> bytes | None:
        """Return the reply to a question that is forwarded, if it need not wait."""
        self._counters.by_name["forwarded"] += 1
        if asks is None:
            return answers.fail(forward, udp=udp)
        query = forward.query
        got = asks.cached(
            forward.name,
            forward.type,
            dnssec=query.dnssec_ok,
            checking_disabled=query.checking_disabled,
        )
        return None if got is None else answers.finish(forward, got, udp=udp)

    async def reply(
        self, forward: Forward, answers: Answers, asks: Asks | None, client: str, *, udp: bool
    ) -> bytes:
        """Return the reply to a question of a client that is forwarded and was admitted."""
        if asks is None:
            return answers.fail(forward, udp=udp)
        query = forward.query
        got = await asks.ask(
            forward.name,
            forward.type,
            dnssec=query.dnssec_ok,
            checking_disabled=query.checking_disabled,
            client=client,
        )
        return answers.finish(forward, got, udp=udp)
