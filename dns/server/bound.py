"""Where it is answered: addresses bound, and their sockets shared out among the workers.

Lives here: which sockets each worker has. Must not: tell workers (seat.py), or make sockets
(listeners.py).
"""

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from vipd.dns.server.listeners import Pair, http_listener, make_room, pair
from vipd.dns.server.seat import Seat
from vipd.dns.server.takeover import Inherited
from vipd.dns.settings import DnsSettings, Listen, parse_http, parse_listen
from vipd.proxy.errors import ConfigError

log = structlog.get_logger()


class Bound:
    """The addresses of some workers, by the setting that says so."""

    def __init__(self) -> None:
        self.at: dict[str, Listen] = {}
        """Where questions are answered; port 0 is what the kernel made of it."""
        self.http_at: dict[str, Listen] = {}
        """Where metrics are told, by the first of the workers."""

    def start(self, settings: DnsSettings, seats: Sequence[Seat], inherited: Inherited) -> None:
        """Give each worker sockets of each address: inherited ones, all of them, or new ones.

        Raise ConfigError where an address is taken.
        """
        for text in settings.listen if seats else ():
            listen = parse_listen(text)
            if listen in self.at.values():
                continue
            there = inherited.pairs.pop(listen, [])
            self._give(text, *_bound(listen, there, settings, len(seats)), seats)
        if seats:
            self.share_http(settings, seats[0], inherited.http)

    def change(self, before: DnsSettings, settings: DnsSettings, seats: Sequence[Seat]) -> None:
        """Give sockets of new addresses, and take those of addresses that are no more.

        Raise ConfigError where one is taken: nothing has changed then.
        """
        stays = _staying(self.at, settings.listen, parse_listen)
        made = _made(settings, [text for text in settings.listen if text not in stays], len(seats))
        self.at = stays
        for seat in seats:
            seat.sockets = [one for one in seat.sockets if one[0] in stays.values()]
        for text, listen, pairs in made:
            self._give(text, listen, pairs, seats)
        if settings.udp_buffer_bytes != before.udp_buffer_bytes:
            for udp, _ in (both for seat in seats for _, both in seat.sockets):
                make_room(udp, settings.udp_buffer_bytes)
        self.share_http(settings, seats[0], {})

    def clear(self) -> None:
        """Forget all addresses."""
        self.at.clear()
        self.http_at.clear()

    def lacks_http(self, settings: DnsSettings) -> bool:
        """Return whether an address for metrics could not be had."""
        return len(self.http_at) < len({parse_http(one) for one in settings.http})

    def share_http(
        self, settings: DnsSettings, first: Seat, inherited: dict[Listen, list[socket.socket]]
    ) -> None:
        """Let the first worker have the sockets for metrics, as far as they can be had."""
        self.http_at = _staying(self.http_at, settings.http, parse_http)
        kept = [one for one in first.http if one[0] in self.http_at.values()]
        for text in settings.http:
            listen = parse_http(text)
            if text in self.http_at or listen in self.http_at.values():
                continue
            there = inherited.get(listen, [])
            try:
                made = there.pop() if there else http_listener(listen)
            except ConfigError as error:
                log.warning("DNS metrics are not told there", why=error.why)
                continue
            listen = Listen(listen.address, made.getsockname()[1])
            self.http_at[text] = listen
            kept.append((listen, made))
        first.http = kept

    def _give(self, text: str, listen: Listen, pairs: list[Pair], seats: Sequence[Seat]) -> None:
        self.at[text] = listen
        for at, both in enumerate(pairs):
            seats[at % len(seats)].sockets.append((listen, both))


def _made(
    settings: DnsSettings, texts: Sequence[str], count: int
) -> list[tuple[str, Listen, list[Pair]]]:
    """Return new sockets for these addresses; raise ConfigError, and none is left."""
    made: dict[Listen, tuple[str, Listen, list[Pair]]] = {}
    try:
        for text in texts:
            listen = parse_listen(text)
            if listen not in made:
                made[listen] = (text, *_bound(listen, [], settings, count))
    except ConfigError:
        _close(both for _, _, pairs in made.values() for both in pairs)
        raise
    return list(made.values())


def _bound(
    listen: Listen, there: list[Pair], settings: DnsSettings, count: int
) -> tuple[Listen, list[Pair]]:
    """Return sockets of an address, one pair for each worker at least. Raise ConfigError."""
    pairs = list(there)
    try:
        while len(pairs) < count:
            both = pair(listen, settings.udp_buffer_bytes, fresh=not pairs)
            listen = Listen(listen.address, both[0].getsockname()[1])
            pairs.append(both)
    except ConfigError:
        _close(pairs)
        raise
    return listen, pairs


def _staying(
    at: Mapping[str, Listen], wanted: Sequence[str], parse: Callable[[str], Listen]
) -> dict[str, Listen]:
    """Return where it goes on, by the setting, which may say the same in other words."""
    found: dict[str, Listen] = {}
    for text in wanted:
        listen = at.get(text, parse(text))
        if listen in at.values() and listen not in found.values():
            found[text] = listen
    return found


def _close(pairs: Iterable[Pair]) -> None:
    for one in (one for both in pairs for one in both):
        one.close()
