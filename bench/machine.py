"""What machine a figure was measured on.

Lives here: the few facts that every report states. Must not: measure.
"""

import os
import platform
import shutil
import subprocess
import time

from vipd.proxy.version import VERSION


def machine() -> dict[str, str]:
    """Return date, kernel, cores and versions, in the order a reader wants them."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "vipd": VERSION,
        "kernel": platform.release(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "nft": _nft_version(),
    }


def _nft_version() -> str:
    tool = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if tool is None:
        return "none"
    printed = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    words = printed.stdout.split()
    return words[1] if len(words) > 1 else "unknown"
