"""What userspace mode needs of a host, and how that is found out without changing anything.

Lives here: the probes and what brings what is missing. Must not: commit (`nft --check`).
"""

import asyncio
import resource

from vipd.backends.nftables import probe as nft_probe
from vipd.backends.nftables.tool import Nft
from vipd.backends.protocol import Capability
from vipd.backends.userspace.rules import commands
from vipd.proxy.errors import DataplaneError, Unsupported
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import NodeNetwork

ENOUGH_FILES = 65_536
"""Open files for 10,000 services over TCP and UDP, and 20,000 connections, of one worker."""


async def capabilities(nft: Nft) -> tuple[Capability, ...]:
    """Return what the mode needs, and whether it is there."""
    tool = await nft_probe.tool(nft.run)
    found = [tool]
    if tool.present:
        found.append(await _rules(nft))
    return (*found, await asyncio.to_thread(_files))


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
