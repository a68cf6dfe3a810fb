"""The process that answers: ``python -m vipd.dns.server NUMBER CONTROL FORM``.

CONTROL is the descriptor of a Unix socket, one that listens or one that is connected, FORM that of
the log: text or json. The process gives its privileges up before it reads any question: sockets
come from whoever started it.
"""

import sys

if __name__ == "__main__":
    from vipd.proxy.lean import without_openssl

    without_openssl()

import asyncio
import gc
import signal
import socket

from vipd.backends import log
from vipd.backends.privileges import allow_descriptors, give_up_privileges
from vipd.dns.server.early import import_early
from vipd.dns.server.worker import run
from vipd.proxy.lean import give_back

DESCRIPTORS = 1 << 16
SWITCH_SECONDS = 0.0005
"""How long a thread that reads a large reply of an upstream may keep questions waiting."""


def main() -> None:
    """Answer until told that it is over."""
    number, descriptor, form = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    log.configure(form)
    sys.setswitchinterval(SWITCH_SECONDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon's: its end is not ours
    import_early()
    allow_descriptors(DESCRIPTORS)
    for event, why in give_up_privileges():
        log.warning(event, why=why)
    # What was imported stays: the collector need not look at it while questions wait.
    gc.collect()
    gc.freeze()
    give_back()
    with socket.socket(fileno=descriptor) as control:
        asyncio.run(run(number, control))


if __name__ == "__main__":
    main()
