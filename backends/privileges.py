"""What a worker process gives up and takes before it serves anybody, whatever it serves.

Lives here: its user, capabilities and limit of open files. Must not: log; who calls is told what
could not be done.
"""

import ctypes
import os
import resource
from collections.abc import Iterator

NOBODY = 65534
CAP_NET_RAW = 13
_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 8, 38, 24
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


def allowed_descriptors(wanted: int) -> int:
    """Return what `allow_descriptors` would allow a child of this process. Changes nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, wanted))
    except (OSError, ValueError):
        return hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted


def give_up_privileges(keep: int | None = None) -> list[tuple[str, str]]:
    """Become nobody, for good. Where this user namespace has no nobody, lose what root may do.

    `keep` is the one capability that stays. Return what could not be done, and why.
    """
    return list(_given_up(ctypes.CDLL(None, use_errno=True), keep))


def _given_up(libc: ctypes.CDLL, keep: int | None) -> Iterator[tuple[str, str]]:
    for capability in range(_MOST_CAPABILITIES):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if keep is not None:
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    has_some = False
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        yield "worker stays root of its user namespace", error.strerror or repr(error)
        has_some = True
    if keep is not None and not _has_only(libc, keep):
        yield "the one capability is not there", os.strerror(ctypes.get_errno())
        keep, has_some = None, True
    if keep is None and has_some and not _has_only(libc, None):
        yield "capabilities are kept", os.strerror(ctypes.get_errno())
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        yield "no_new_privs is not set", os.strerror(ctypes.get_errno())


def _has_only(libc: ctypes.CDLL, keep: int | None) -> bool:
    """Have no capability but this one; return whether that is so (capset(2), version 3)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    bits = 0 if keep is None else 1 << keep
    # Effective, permitted and inheritable set, first the lower half of each, then the upper one.
    data = (ctypes.c_uint32 * 6)(bits, bits, 0, 0, 0, 0)
    return bool(libc.capset(header, data) == 0)
