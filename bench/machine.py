"""What machine a figure was measured on.

Lives here: the few facts that every report states. Must not: measure.
"""

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

from vipd.proxy.version import VERSION


def machine() -> dict[str, str]:
    """Return date, kernel, cores and versions, in the order a reader wants them.

    `emulated` is there only where the processor is software, so that figures are not comparable.
    """
    facts = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "vipd": VERSION,
        "kernel": platform.release(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "nft": _version("nft").split(" ")[0],
        "iptables": _version("iptables"),
    }
    processor = _processor()
    return facts if "QEMU" not in processor else {**facts, "emulated": processor}


def _version(tool: str) -> str:
    """Return the version that a tool prints, as `1.8.9 (legacy)`: the second word and the rest."""
    found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        return "none"
    printed = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return printed.stdout.strip().partition(" ")[2].removeprefix("v") or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return ""
