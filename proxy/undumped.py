"""Memory that holds credentials stays out of core dumps.

Lives here: the one call. Must not: be called where there are no credentials: a dump of a crash is
worth having then.
"""

import contextlib
import ctypes

_PR_SET_DUMPABLE = 4


def keep_from_dumps() -> None:
    """Let the kernel write no core dump of this process, whatever its limits and core_pattern say.

    A limit would not do: programs that dumps are piped to, such as systemd-coredump, are run all
    the same (core(5)). Other users may not look into the process either; root with CAP_SYS_PTRACE,
    so gdb and py-spy, still may. Programs that it starts are not concerned (prctl(2)).
    """
    with contextlib.suppress(AttributeError, OSError):  # a libc without the call
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
