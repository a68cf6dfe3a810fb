"""Who may ask, and how often others are told that they may not.

Lives here: both decisions. Pure: the clock is given. Must not: know sockets or messages.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

from vipd.proxy.names import Network

MOST_REMEMBERED = 8192
"""Sources whose verdict is remembered; then all are looked at anew."""
MOST_NETWORKS = 4096
"""Source networks whose refusals are counted; the one refused longest ago goes first."""
MOST_PER_SECOND = 500
"""Refusals to all networks together: with forged sources, each could be another network."""


class Access:
    """Networks that may ask. A change costs what it concerns, however many there are."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._prefixes: dict[tuple[int, int], dict[int, int]] = {}
        """By version and bits behind the prefix: prefixes, and how often each was admitted."""
        self.verdicts: dict[str, bool] = {}
        """Sources as text, and whether they may ask; those that were looked at."""
        self.admit(networks)

    def admit(self, networks: Iterable[Network]) -> None:
        """Let networks ask; the same one may be admitted for several reasons."""
        for one in networks:
            shift = one.max_prefixlen - one.prefixlen
            there = self._prefixes.setdefault((one.version, shift), {})
            prefix = int(one.network_address) >> shift
            there[prefix] = there.get(prefix, 0) + 1
        self.verdicts.clear()

    def expel(self, networks: Iterable[Network]) -> None:
        """Take one reason from each of these networks."""
        for one in networks:
            shift = one.max_prefixlen - one.prefixlen
            there = self._prefixes[one.version, shift]
            prefix = int(one.network_address) >> shift
            there[prefix] -= 1
            if not there[prefix]:
                del there[prefix]
            if not there:
                del self._prefixes[one.version, shift]
        self.verdicts.clear()

    def admits(self, source: str) -> bool:
        """Return whether a source may ask; its text is as the kernel gives it."""
        verdict = self.verdicts.get(source)
        if verdict is None:
            if len(self.verdicts) >= MOST_REMEMBERED:
                self.verdicts.clear()
            verdict = self.verdicts[source] = self._look(source)
        return verdict

    def _look(self, source: str) -> bool:
        address = _address(source)
        value = int(address)
        return any(
            version == address.version and value >> shift in found
            for (version, shift), found in self._prefixes.items()
        )


class Refusals:
    """How often REFUSED is said: so often a second to each network, /24 or /64."""

    def __init__(self, per_second: int, now: float) -> None:
        self.per_second = per_second
        self._left: dict[str, tuple[float, float]] = {}
        """Refusals that are left to a network, and when that was so; the longest ago first."""
        self._of_all = (float(MOST_PER_SECOND), now)

    def may(self, source: str, now: float) -> bool:
        """Return whether a source is told that it is refused, and count it."""
        network = _network(source)
        left = _refilled(self._left.pop(network, (self.per_second, now)), self.per_second, now)
        of_all = _refilled(self._of_all, MOST_PER_SECOND, now)
        told = left >= 1 and of_all >= 1
        if len(self._left) >= MOST_NETWORKS:
            del self._left[next(iter(self._left))]
        self._left[network] = (left - told, now)
        self._of_all = (of_all - told, now)
        return told


def _refilled(state: tuple[float, float], per_second: float, now: float) -> float:
    left, then = state
    return min(per_second, left + (now - then) * per_second)


def _network(source: str) -> str:
    if ":" not in source:
        return source[: source.rfind(".")]
    return _address(source).packed[:8].hex()


def _address(source: str) -> IPv4Address | IPv6Address:
    return ip_address(source.partition("%")[0])
