"""The programs of others that `vipd bench dns` needs, and which package has them.

Lives here: finding them and their versions. Must not: know how they are used.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable

from vipd.bench.dns_plan import COREDNS, DNSMASQ, KNOT, THROUGHPUT, UNBOUND, Measure
from vipd.bench.lab_errors import LabError

PROGRAMS = {UNBOUND: "unbound", KNOT: "knotd", DNSMASQ: "dnsmasq", COREDNS: "coredns"}
"""Programs, by variant."""
_PACKAGES = {"unbound": "unbound", "knotd": "knot", "dnsmasq": "dnsmasq-base", "dnsperf": "dnsperf"}
_VERSION_OPTIONS = {"unbound": "-V", "dnsmasq": "-v", "dnsperf": "-h", "coredns": "-version"}


def found(tool: str) -> str | None:
    """Return the path of a tool, or None. /usr/sbin is not on every user's PATH."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def path(tool: str) -> str:
    """Return the path of a tool; raise LabError saying how to get it."""
    if (place := found(tool)) is None:
        raise LabError(lacking(tool))
    return place


def lacking(tool: str) -> str:
    """Return what to do to get a tool."""
    package = _PACKAGES.get(tool)
    if package is None:
        return f"no `{tool}` on PATH, and Debian has no package of it"
    return f"`{tool}` was not found: apt-get install {package}"


def require(measures: Iterable[Measure]) -> None:
    """Raise LabError where the load generator that these measures need is missing."""
    if any(one in THROUGHPUT for one in measures):
        path("dnsperf")


def unavailable(variants: Iterable[str]) -> dict[str, str]:
    """Return, for each variant that this host cannot do, why."""
    tools = {one: PROGRAMS[one] for one in variants if one in PROGRAMS}
    return {one: lacking(tool) for one, tool in tools.items() if found(tool) is None}


def version(tool: str) -> str:
    """Return the version that a tool prints, or `unknown`."""
    option = _VERSION_OPTIONS.get(tool, "--version")
    done = subprocess.run([path(tool), option], capture_output=True, text=True, check=False)
    told = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return told.group() if told else "unknown"
