"""Sessions of UDP whose datagrams got no answer, and the errors that came back for them.

Lives here: who is looked at, and when. Must not: decide what an error means (udp.py).

asyncio-dgram tells of errors only to those who ask, and a client may never send again from the same
port. Each datagram is looked after once, after LOOK_SECONDS or twice that: many protocols have no
answers.
"""

import asyncio
from collections.abc import Callable

from vipd.backends.userspace.forwarder.udp_sessions import Session

LOOK_SECONDS = 0.1
"""How often it is looked whether an error came back for what got no answer."""


class Unanswered:
    """The sessions that wait for an answer. `failed` is called for each that got an error."""

    def __init__(self, failed: Callable[[Session], None]) -> None:
        self._failed = failed
        self._new: dict[Session, None] = {}
        self._longer: dict[Session, None] = {}
        self._look: asyncio.TimerHandle | None = None

    def add(self, session: Session) -> None:
        """Note that a datagram was sent."""
        self._new[session] = None
        if self._look is None:
            self._look_later()

    def discard(self, session: Session) -> None:
        """Note that an answer came, or that nobody waits for one any more."""
        self._new.pop(session, None)
        self._longer.pop(session, None)

    def close(self) -> None:
        """Look no more."""
        if self._look is not None:
            self._look.cancel()

    def _look_later(self) -> None:
        self._look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_for_errors)

    def _look_for_errors(self) -> None:
        self._look = None
        looked_at = self._longer
        self._longer, self._new = self._new, {}
        for session in looked_at:
            try:
                if session.link is not None:
                    session.link.check()
            except OSError:
                self._failed(session)
        if self._longer or self._new:
            self._look_later()
