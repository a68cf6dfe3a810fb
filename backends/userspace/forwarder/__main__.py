"""The worker as a process: ``python -m vipd.backends.userspace.forwarder NUMBER CONTROL FORM``.

CONTROL is the descriptor of a listening Unix socket, FORM that of the log: text or json. The
process gives its privileges up before it serves anything: listeners come from the daemon, and
connecting needs none. With a further word, ``transparent``, it keeps CAP_NET_RAW, without which no
socket can have an address that is not the node's (ip(7), IP_TRANSPARENT).
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
from vipd.backends.privileges import CAP_NET_RAW, allow_descriptors, give_up_privileges
from vipd.backends.userspace.forwarder.descriptors import WANTED
from vipd.backends.userspace.forwarder.worker import run
from vipd.proxy.lean import give_back


def main() -> None:
    """Serve until the daemon says that it is over."""
    number, descriptor, form = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    transparent = sys.argv[4:] == ["transparent"]
    log.configure(form, number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon's: its end is not ours
    descriptors = allow_descriptors(WANTED)
    for event, why in give_up_privileges(keep=CAP_NET_RAW if transparent else None):
        log.warning(event, why=why)
    # What was imported stays: the collector need not look at it while connections wait.
    gc.collect()
    gc.freeze()
    give_back()
    with socket.socket(fileno=descriptor) as control:
        asyncio.run(run(number, control, descriptors, transparent=transparent))


if __name__ == "__main__":
    main()
