"""Which sources may connect to a place, which of them are inside, and who sees their addresses.

Lives here: the questions about a client's address, and a bounded memory of the answers. Pure.
Must not: know endpoints.
"""

from collections.abc import Callable

from vipd.backends.userspace.objects import Forwarding, Surroundings
from vipd.proxy.names import Address, parse_address

MOST_ANSWERS = 4096
"""Clients remembered; more are parsed anew."""


class Sources:
    """The sources of one place. `own` is the address of the place.

    Who connects from it, or from loopback, is this node: by default the kernel takes the address
    of a local destination as the source too.
    """

    def __init__(self, forwarding: Forwarding, surroundings: Surroundings, own: Address) -> None:
        self._ranges = forwarding.allowed_sources
        self._differs = forwarding.inside != forwarding.outside
        self._pods = surroundings.pods
        self._own = surroundings.own
        self._pods_come_by = surroundings.interface
        self._place = own
        self._transparent = frozenset(forwarding.transparent)
        self._for_pods = forwarding.transparent_for_pods
        self._allowed: dict[str, bool] = {}
        self._inside: dict[str, bool] = {}
        self._shown: dict[str, bool] = {}
        self.asks_interface = (self._differs or self._for_pods) and bool(self._pods_come_by)
        """Whether `came_by` has to be called before `is_inside` and `shows`."""

    def allows(self, client: str) -> bool:
        """Return whether the client is in the ranges of the place, if there are any."""
        if self._ranges is None:
            return True
        return _remembered(self._allowed, client, self._in_ranges)

    def is_inside(self, client: str) -> bool:
        """Return whether the client is a pod of this node or the node itself.

        Asked only where it makes a difference; true where it makes none.
        """
        if not self._differs:
            return True
        return _remembered(self._inside, client, self._from_here)

    def shows(self, client: str, endpoint: Address) -> bool:
        """Return whether an endpoint may see the client's address: it is one of those, and the
        table does not masquerade either. Never that of the node itself."""
        if endpoint not in self._transparent:
            return False
        return _remembered(self._shown, client, self._may_be_shown)

    def came_by(self, client: str, interface: str) -> None:
        """Note where the client came in; an empty text is nowhere."""
        wanted = self._pods_come_by
        is_pod = wanted == interface
        if wanted.endswith("*"):
            is_pod = interface.startswith(wanted[:-1])
        self._inside.pop(client, None)
        _remembered(self._inside, client, lambda one: is_pod or self._from_here(one))
        if self._for_pods:
            self._shown.pop(client, None)
            _remembered(self._shown, client, lambda one: self._may_be_shown(one, is_pod))

    def _in_ranges(self, address: Address) -> bool:
        return any(address in one for one in self._ranges or ())

    def _from_here(self, address: Address) -> bool:
        return self._is_node(address) or self._is_pod(address)

    def _may_be_shown(self, address: Address, came_as_pod: bool = False) -> bool:
        # A link-local address means nothing on another link.
        if self._is_node(address) or address.is_link_local:
            return False
        return not self._for_pods or came_as_pod or self._is_pod(address)

    def _is_node(self, address: Address) -> bool:
        return address == self._place or address.is_loopback or address in self._own

    def _is_pod(self, address: Address) -> bool:
        return any(address in one for one in self._pods)


def _remembered(answers: dict[str, bool], client: str, question: Callable[[Address], bool]) -> bool:
    answer = answers.get(client)
    if answer is None:
        answer = answers[client] = question(_parsed(client))
        if len(answers) > MOST_ANSWERS:
            del answers[next(iter(answers))]
    return answer


def _parsed(client: str) -> Address:
    """Return the address, without its scope; an IPv4 one for what IPv6 sockets make of those."""
    address = parse_address(client.partition("%")[0])
    mapped = address.ipv4_mapped if address.version == 6 else None
    return mapped if mapped is not None else address
