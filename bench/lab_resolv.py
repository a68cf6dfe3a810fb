"""Whom a lab's hosts ask for names: the file that `ip netns exec` binds over /etc/resolv.conf.

Lives here: what stands in that file, writing it and taking it away. Must not: know hosts, or where
an address comes from (lab_container.py).
The file is /etc/netns/NAMESPACE/resolv.conf (ip-netns(8)). Its first line says whose it is: a file
without that line is somebody else's and stays. What runs already keeps the file it started with.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from vipd.bench.lab_errors import LabError
from vipd.proxy.names import Address

DIRECTORY = Path("/etc/netns")
CLUSTER_DOMAIN = "cluster.local"
"""The cluster domain where nobody says another: the kubelet's usual clusterDomain."""
_FILE = "resolv.conf"


def resolv_conf(nameserver: Address, namespace: str, domain: str = CLUSTER_DOMAIN) -> str:
    """Return the file that a pod of a namespace has with dnsPolicy ClusterFirst, as text.

    Source: pkg/kubelet/network/dns, without the search domains of the node's own file.
    """
    return (
        f"search {namespace}.svc.{domain} svc.{domain} {domain}\n"
        f"nameserver {nameserver}\n"
        "options ndots:5\n"
    )


def point_at_nameserver(netns: str, prefix: str, nameserver: Address, namespace: str) -> None:
    """Have what is started in network namespace `netns` from now on ask `nameserver`, port 53.

    `prefix` is that of the lab it belongs to, `namespace` the Kubernetes namespace that short names
    are looked up in. Raise LabError where the file is somebody else's, or cannot be written. The
    caller holds the lab's lock.
    """
    path = DIRECTORY / netns / _FILE
    wanted = f"{_first_line(prefix)}\n{resolv_conf(nameserver, namespace)}"
    try:
        found = _read(path)
        if found == wanted:
            return
        if found is not None and not _is_ours(found, prefix):
            raise LabError(f"{path} exists and was not made by this lab; it is left alone")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not beside it: `ip netns exec` binds whatever it finds in that folder.
        beside = DIRECTORY / f".{netns}.{_FILE}"
        beside.write_text(wanted)
        beside.rename(path)
    except OSError as failure:
        raise LabError(f"{path} cannot be written: {failure.strerror}") from failure


def forget_nameserver(netns: str, prefix: str) -> None:
    """Take the file of one network namespace away, if it is this lab's; none there is success."""
    path = DIRECTORY / netns / _FILE
    try:
        if not _is_ours(_read(path) or "", prefix):
            return
        path.unlink(missing_ok=True)
        _remove_empty(path.parent)
        _remove_empty(DIRECTORY)
    except OSError as failure:
        raise LabError(f"{path} cannot be taken away: {failure.strerror}") from failure


def named(prefix: str) -> Iterator[str]:
    """Yield the network namespaces that this lab has written a file for, whether they stand."""
    for path in sorted(DIRECTORY.glob(f"{prefix}-*/{_FILE}")):
        if _is_ours(_read(path) or "", prefix):
            yield path.parent.name


def _first_line(prefix: str) -> str:
    return f"# vipd lab {prefix}"


def _is_ours(text: str, prefix: str) -> bool:
    return text.partition("\n")[0] == _first_line(prefix)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove_empty(folder: Path) -> None:
    """Remove a folder that is empty: somebody else's files keep theirs."""
    if not os.listdir(folder):
        folder.rmdir()
