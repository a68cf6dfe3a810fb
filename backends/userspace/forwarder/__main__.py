"""The worker as a process: ``python -m vipd.backends.userspace.forwarder NUMBER CONTROL FORM``.

CONTROL is the descriptor of a listening Unix socket, FORM that of the log: text or json. The
process gives its privileges up before it serves anything: listeners come from the daemon, and
connecting needs none.
"""

import sys

if __name__ == "__main__":
    from vipd.backends.userspace.forwarder.lean import without_openssl

    without_openssl()

import asyncio
import ctypes
import gc
import os
import resource
import signal
import socket

from vipd.backends.userspace.forwarder import log
from vipd.backends.userspace.forwarder.descriptors import WANTED
from vipd.backends.userspace.forwarder.worker import run

NOBODY = 65534
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 38, 24
_MOST_CAPABILITIES = 64


def main() -> None:
    """Serve until the daemon says that it is over."""
    number, descriptor, form = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    log.configure(form)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon's: its end is not ours
    descriptors = allow_descriptors()
    give_up_privileges()
    # What was imported stays: the collector need not look at it while connections wait.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as control:
        asyncio.run(run(number, control, descriptors))


def allow_descriptors() -> int:
    """Raise the limit of open files as far as it is wanted and may be, and return it.

    Whoever has CAP_SYS_RESOURCE may raise the hard limit too, up to the sysctl fs.nr_open.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (WANTED, max(WANTED, hard)))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def give_up_privileges() -> None:
    """Become nobody, for good. Where this user namespace has no nobody, lose what root may do."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(_MOST_CAPABILITIES):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        log.warning("worker stays root of its user namespace", why=error.strerror)
        _lose_capabilities(libc)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        log.warning("no_new_privs is not set", why=os.strerror(ctypes.get_errno()))


def _lose_capabilities(libc: ctypes.CDLL) -> None:
    """Clear the effective, permitted and inheritable sets (capset(2), version 3)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        log.warning("capabilities are kept", why=os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main()
