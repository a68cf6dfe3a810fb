"""The programs of others that `vipd bench datapath` needs, and which package has them.

Lives here: finding them and their versions. Must not: know how they are used.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable

from vipd.bench.datapath_plan import Measure
from vipd.bench.lab_errors import LabError

PACKAGES = {"haproxy": "haproxy", "iperf3": "iperf3", "wrk": "wrk", "nginx": "nginx-light"}
"""Debian's packages, by tool."""
_NEEDED = {
    Measure.BULK: ("iperf3",),
    Measure.KEPT: ("wrk",),
    Measure.NEW: ("wrk",),
}


def found(tool: str) -> str | None:
    """Return the path of a tool, or None. /usr/sbin is not on every user's PATH."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def path(tool: str) -> str:
    """Return the path of a tool; raise LabError naming its package."""
    if (place := found(tool)) is None:
        raise LabError(f"`{tool}` was not found: apt-get install {PACKAGES[tool]}")
    return place


def needed(measures: Iterable[Measure]) -> tuple[str, ...]:
    """Return the tools without which these measures cannot be taken; nginx always answers."""
    return ("nginx", *dict.fromkeys(tool for one in measures for tool in _NEEDED.get(one, ())))


def require(measures: Iterable[Measure]) -> None:
    """Raise LabError naming the packages of all tools that are missing."""
    missing = [tool for tool in needed(measures) if found(tool) is None]
    if missing:
        packages = " ".join(PACKAGES[tool] for tool in missing)
        raise LabError(f"{', '.join(missing)} not found: apt-get install {packages}")


def version(tool: str) -> str:
    """Return the version that a tool prints, or `unknown`."""
    option = "--version" if tool == "iperf3" else "-v"
    # wrk prints its version with status 1, nginx on standard error.
    done = subprocess.run([path(tool), option], capture_output=True, text=True, check=False)
    told = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return told.group() if told else "unknown"
