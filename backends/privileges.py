"""What a worker process gives up and takes before it serves anybody, whatever it serves.

Lives here: its user, capabilities and limit of open files. Must not: log; who calls is told what
could not be done.
"""

import ctypes
import os
import resource
from collections.abc import Iterator

NOBODY = 65534
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 38, 24
_MOST_CAPABILITIES = 64


def allow_descriptors(wanted: int) -> int:
    """Raise the limit of open files as far as it is wanted and may be, and return it.

    Whoever has CAP_SYS_RESOURCE may raise the hard limit too, up to the sysctl fs.nr_open.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def give_up_privileges() -> list[tuple[str, str]]:
    """Become nobody, for good. Where this user namespace has no nobody, lose what root may do.

    Return what could not be done, and why.
    """
    return list(_given_up(ctypes.CDLL(None, use_errno=True)))


def _given_up(libc: ctypes.CDLL) -> Iterator[tuple[str, str]]:
    for capability in range(_MOST_CAPABILITIES):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        yield "worker stays root of its user namespace", error.strerror or repr(error)
        # The effective, permitted and inheritable sets (capset(2), version 3).
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
            yield "capabilities are kept", os.strerror(ctypes.get_errno())
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        yield "no_new_privs is not set", os.strerror(ctypes.get_errno())
