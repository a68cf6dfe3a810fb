"""What is served at a place, before anybody has come: as the daemon told it, and no more.

Lives here: the step from there to the state of a place. Must not: know sockets.

A worker has all places of the node, and in most of them clients never come. Kept as it was told, a
place with five endpoints takes a third of the memory, and half of the time that it takes to listen.
"""

from vipd.backends.userspace import messages
from vipd.backends.userspace.forwarder.balance import Chance
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.messages import WireForwarding
from vipd.backends.userspace.objects import Place, Surroundings


class OnDemand:
    """What is served at a place. `told` is how, `made` its state, None until a client comes."""

    __slots__ = ("_chance", "_place", "_surroundings", "made", "told")

    def __init__(
        self, place: Place, told: WireForwarding, surroundings: Surroundings, chance: Chance
    ) -> None:
        self.told = told
        self.made: Served | None = None
        self._place = place
        self._surroundings = surroundings
        self._chance = chance

    def serve(self) -> Served:
        """Return the state of the place: a client has come."""
        if self.made is None:
            forwarding = messages.forwarding_of(self.told)
            self.made = Served(self._place, forwarding, self._surroundings, self._chance)
        return self.made

    def change(self, told: WireForwarding, surroundings: Surroundings) -> None:
        """Serve like this from now on."""
        self.told, self._surroundings = told, surroundings
        if self.made is not None:
            self.made.update(messages.forwarding_of(told), surroundings)
