"""How a connection on which nothing moves is found dead: keepalive probes of the kernel (tcp(7)).

Lives here: the times, and how they are set. What is accepted inherits them from its listener.

The kernel's own first probe comes after two hours: so long a client or an endpoint that vanished
without a word (its node lost its power) would hold a connection of its client's share.
"""

import socket
from typing import Final

IDLE_SECONDS: Final = 300
"""Of silence before the first probe."""
INTERVAL_SECONDS: Final = 30
PROBES: Final = 4
"""Without an answer, until the connection is given up."""


def keep_alive(sock: socket.SocketType) -> None:
    """Let the kernel probe this connection, or those that this listener accepts."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
