"""Which client stays with which endpoint, and until when.

Lives here: a bounded memory of clients. Pure. Must not: know which endpoints there are; who asks
sees whether the endpoint can still be used, and writes down the other one where it cannot.
"""

from collections import OrderedDict

from vipd.backends.userspace.forwarder.balance import Spot

MOST_CLIENTS = 65_536
"""As many as nftables mode remembers for a service port."""


class Affinity:
    """Clients of a place and their endpoints. Beyond `most`, who was seen longest ago is forgotten.

    `seconds` may be changed at any time, and counts for those who are already known too.
    """

    def __init__(self, seconds: float, most: int = MOST_CLIENTS) -> None:
        self.seconds = seconds
        self.forgotten = 0
        """Clients that were forgotten before their time, for lack of room."""
        self._most = most
        self._known: OrderedDict[str, tuple[Spot, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def of(self, client: str, now: float) -> Spot | None:
        """Return where the client belongs; None where it is not known or its time is over."""
        known = self._known.get(client)
        if known is None:
            return None
        spot, seen = known
        if now - seen >= self.seconds:
            del self._known[client]
            return None
        return spot

    def held(self, client: str, now: float) -> tuple[Spot, float] | None:
        """Return where the client belongs, and for how many seconds yet."""
        spot = self.of(client, now)
        return None if spot is None else (spot, self._known[client][1] + self.seconds - now)

    def stays(self, client: str, spot: Spot, now: float) -> None:
        """Let the client belong there from now on."""
        self._known[client] = (spot, now)
        self._known.move_to_end(client)
        # Two at a time: memory shrinks while clients come, and no call has to forget thousands.
        for _ in range(2):
            oldest = next(iter(self._known))
            if oldest == client or now - self._known[oldest][1] < self.seconds:
                break
            del self._known[oldest]
        if len(self._known) > self._most:
            self._known.popitem(last=False)
            self.forgotten += 1
