"""What tests of the transparent mode ask: who saw whom, and what there is for it on the node.

Lives here: the setting, and what the kernel tells. Must not: know what should be there.
"""

import os
from pathlib import Path

from tests.netns.cluster import Cluster, Served

from vipd.proxy.names import Address

BIT = 7
"""Of the mark: another one than by default."""


def configuration(folder: Path, *, transparent: bool = True, bit: int = BIT) -> str:
    """Write a configuration file with the setting; return its path."""
    path = folder / "vipd.yaml"
    path.write_text(
        "apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"
        f"userspace: {{transparent: {str(transparent).lower()}, transparentBit: {bit}}}\n"
    )
    return str(path)


def seen(served: Served, client: str, to: Address | None = None, port: int = 80) -> str:
    """Who answered a request, and whom that one saw."""
    answer = served.ask(client, to, port)
    return f"{answer.pod} saw {served.cluster.host_of(answer.source)}"


def return_paths(cluster: Cluster) -> list[str]:
    """What there is of return paths on the node."""
    found = [one for one in cluster.tables() if "vipd-transparent" in one]
    for family in ("-4", "-6"):
        for what in (["rule", "list"], ["route", "show", "table", "all"]):
            printed = cluster.lab.exec("node", ["ip", family, *what]).stdout.splitlines()
            found += [
                f"{family} {one.strip()}"
                for one in printed
                if "lookup 119" in one or "table 119" in one
            ]
    return sorted(found)


def transparent_workers(cluster: Cluster) -> list[dict[str, str]]:
    """What the kernel says of the worker processes that may show addresses."""
    here = os.stat(cluster.lab.path("node")).st_ino
    found = []
    for one in Path("/proc").glob("[0-9]*"):
        try:
            words = (one / "cmdline").read_bytes().split(b"\0")
            if words[-2:] != [b"transparent", b""] or os.stat(one / "ns/net").st_ino != here:
                continue
            lines = (one / "status").read_text().splitlines()
        except OSError:
            continue  # it has ended
        found.append(dict(line.split(":\t", 1) for line in lines if ":\t" in line))
    return found
