"""How willing the kernel is to end this process when memory is short.

Lives here: the one write to /proc. Must not: know what the number should be.
Source: proc_pid_oom_score_adj(5).
"""

import os

import structlog

PATH = "/proc/self/oom_score_adj"

log = structlog.get_logger()


def adjust(score: int | None) -> None:
    """Set it, -1000 (never) to 1000, for this process and those that it starts; None leaves it.

    Less than it is takes CAP_SYS_RESOURCE: without it this is a warning, as in kube-proxy.
    """
    if score is None:
        return
    try:
        with open(PATH, "w") as file:
            file.write(str(score))
    except OSError as error:
        log.warning("oom_score_adj stays as it is", asked=score, why=os.strerror(error.errno or 0))
