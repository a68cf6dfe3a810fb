"""The sockets that DNS is answered on: made by whoever may bind what it likes.

Lives here: their options, and a complaint that names who has the place. Must not: read them.
"""

import contextlib
import os
import socket
from pathlib import Path

from vipd.backends.userspace.listeners import holders, listener
from vipd.backends.userspace.objects import Place
from vipd.dns.settings import Listen
from vipd.proxy.errors import ConfigError
from vipd.proxy.names import Protocol, family_of

Pair = tuple[socket.socket, socket.socket]
"""UDP and TCP."""

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_OMIT = 10, 23, 5
_SO_RCVBUFFORCE = 33
_IP_FREEBIND = 15
_HTTP_BACKLOG = 64
_ATTEMPTS = 20
_FORWARDER = b"vipd.backends.userspace.forwarder"


def pair(listen: Listen, buffer_bytes: int, *, fresh: bool) -> Pair:
    """Return sockets that listen on an address, which need not be the node's yet.

    `fresh`: nobody of ours is there, so nobody may be. Sockets with SO_REUSEPORT share a place with
    others of this user, which would get half of the questions. Raise ConfigError that says who
    is there. Port 0 is any that is free for both.
    """
    for _ in range(_ATTEMPTS if not listen.port else 1):
        made: list[socket.socket] = []
        place = _place(listen, Protocol.UDP)
        try:
            if fresh and listen.port and not _is_left(listen):
                _require_free(listen)
            made.append(listener(place))
            port = made[0].getsockname()[1]
            place = _place(Listen(listen.address, port), Protocol.TCP)
            made.append(listener(place))
            make_room(made[0], buffer_bytes)
            return made[0], made[1]
        except OSError as error:
            for one in made:
                one.close()
            why = os.strerror(error.errno or 0)
            who = holders([_place(listen, one) for one in (Protocol.UDP, Protocol.TCP)])
            by = f": {', '.join(dict.fromkeys(who.values()))}" if who else ""
            refused = ConfigError("DNS", f"{listen}: {why}{by}")
    raise refused


def _is_left(listen: Listen) -> bool:
    """Return whether nobody but workers of userspace mode has the place.

    They had a virtual server there, and leave as soon as the table says that DNS is answered here;
    until then they forward what the kernel gives them, to the same service.
    """
    found = holders([_place(listen, one) for one in (Protocol.UDP, Protocol.TCP)]).values()
    try:
        numbers = {one.rpartition(" ")[2].rstrip(")") for one in found}
        words = [Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0") for one in numbers]
    except OSError:
        return False
    return bool(words) and all(_FORWARDER in one for one in words)


def http_listener(listen: Listen) -> socket.socket:
    """Return a socket that listens for HTTP. Raise ConfigError that says who is there."""
    place = _place(listen, Protocol.TCP)
    made: socket.socket | None = None
    try:
        made = socket.socket(_family(listen), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((str(listen.address), listen.port))
        made.listen(_HTTP_BACKLOG)
    except OSError as error:
        if made is not None:
            made.close()
        who = holders([place])
        by = f": {', '.join(who.values())}" if who else ""
        raise ConfigError("DNS", f"{listen}: {os.strerror(error.errno or 0)}{by}") from error
    return made


def _family(listen: Listen) -> socket.AddressFamily:
    return socket.AF_INET6 if listen.address.version == 6 else socket.AF_INET


def _require_free(listen: Listen) -> None:
    """Raise OSError if anybody has the place, whoever would share it."""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        family = _family(listen)
        with socket.socket(family, kind) as tried:
            if kind == socket.SOCK_STREAM:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            tried.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            tried.bind((str(listen.address), listen.port))


def make_room(udp: socket.socket, buffer_bytes: int) -> None:
    """Let questions wait, and let no forged message about a path's MTU make replies fail."""
    try:
        udp.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)
    except PermissionError:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    with contextlib.suppress(OSError):
        if udp.family == socket.AF_INET6:
            udp.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_OMIT)
        else:
            udp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_OMIT)


def _place(listen: Listen, protocol: Protocol) -> Place:
    return Place(family_of(listen.address), protocol, listen.address, listen.port)
