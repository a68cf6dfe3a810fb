"""What userspace mode needs of a host, and how that is found out without changing anything.

Lives here: the probes and what brings what is missing. Must not: commit (`nft --check`).
"""

import asyncio
import resource
import socket

from vipd.backends.local_routes import ipv6
from vipd.backends.nftables import probe as nft_probe
from vipd.backends.nftables.tool import Nft
from vipd.backends.protocol import Capability
from vipd.backends.userspace import return_path
from vipd.backends.userspace.policy_routing import wrong_settings
from vipd.backends.userspace.rules import commands
from vipd.proxy.errors import DataplaneError, Unsupported
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import NodeNetwork

_IP_TRANSPARENT = 19
SOURCE_REMEDY = "set net.ipv4.conf.*.src_valid_mark=0, for all and for each interface"
ENOUGH_FILES = 65_536
"""Open files for 10,000 services over TCP and UDP, and 20,000 connections, of one worker."""


async def capabilities(nft: Nft, transparent: bool = False) -> tuple[Capability, ...]:
    """Return what the mode needs, and whether it is there; `transparent`: it is to be so."""
    tool = await nft_probe.tool(nft.run)
    found = [tool]
    if tool.present:
        found.append(await _rules(nft))
    found.append(await asyncio.to_thread(_files))
    found.append(await asyncio.to_thread(ipv6))
    if tool.present:
        found.append(await _transparent(nft, transparent))
    return (*found, await asyncio.to_thread(_source, transparent))


async def _transparent(nft: Nft, needed: bool) -> Capability:
    """Return whether endpoints can be shown their clients' addresses."""
    name, remedy = "transparent", "kernel modules nft_socket, nf_socket_ipv4, nf_socket_ipv6"
    lines = [line for family in Family for line in return_path.commands(family, "0x1000")]
    try:
        await nft.run(["--check", "-f", "-"], "".join(f"{line}\n" for line in lines))
    except Unsupported as error:
        return Capability(name, False, error.capability, error.remedy, needed)
    except DataplaneError as error:
        return Capability(name, False, str(error), remedy, needed)
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
    except OSError as error:
        return Capability(name, False, error.strerror or "", "CAP_NET_RAW for the daemon", needed)
    return Capability(name, True, "endpoints on this node can see their clients' addresses")


def _source(needed: bool) -> Capability:
    """Return whether the kernel lets answers to transparent connections of IPv4 in."""
    wrong = wrong_settings()
    name = "src_valid_mark"
    if not wrong:
        return Capability(name, True, "off, as transparent connections over IPv4 need it")
    why = f"{' '.join(wrong)} set"
    return Capability(name, False, why, f"for userspace.transparent: {SOURCE_REMEDY}", needed)


async def _rules(nft: Nft) -> Capability:
    name, remedy = "the guard", "kernel modules nft_ct, nft_fib, nft_reject, nf_conntrack"
    lines = [line for family in Family for line in commands(family, NodeNetwork(), whole=True)]
    try:
        await nft.run(["--check", "-f", "-"], "".join(f"{line}\n" for line in lines))
    except Unsupported as error:
        return Capability(error.capability, False, remedy=error.remedy)
    except DataplaneError as error:
        return Capability(name, False, str(error), remedy)
    return Capability(name, True)


def _files() -> Capability:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    enough = most == resource.RLIM_INFINITY or most >= ENOUGH_FILES
    return Capability(
        "open files",
        enough,
        f"at most {most} for each worker",
        f"a worker started from here may have {most}, and {ENOUGH_FILES} are wanted: raise the "
        "hard limit (LimitNOFILE= of systemd, ulimit -Hn)",
        needed=False,
    )
