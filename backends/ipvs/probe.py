"""What IPVS mode needs of a host, and how that is found out without leaving a change.

Lives here: the probes, loading a module, and what brings what is missing. Must not: commit.
"""

import asyncio
import os
import shutil
from ipaddress import ip_address

from vipd.backends.ipset import IpSets
from vipd.backends.ipvs.kernel import REMEDY, Kernel
from vipd.backends.ipvs.objects import ADD, DELETE, Manner, Operation, Service
from vipd.backends.ipvs.schedulers import Scheduler, module
from vipd.backends.ipvs.settings import CONNTRACK
from vipd.backends.local_routes import ipv6
from vipd.backends.protocol import Capability
from vipd.backends.sysctl import ROOT
from vipd.backends.xtables import INSTALL, Xtables
from vipd.proxy.errors import DataplaneError, Unsupported
from vipd.proxy.names import Family, Protocol
from vipd.proxy.settings import IpvsSettings

SCTP, IPV6 = "ip_vs SCTP", "ip_vs IPv6"
_TEST_ADDRESS = {Family.IPV4: ip_address("192.0.2.118"), Family.IPV6: ip_address("2001:db8::118")}
"""Of the ranges that documentation uses (RFC 5737, RFC 3849); the port is one that is free."""
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


async def capabilities(kernel: Kernel, settings: IpvsSettings) -> tuple[Capability, ...]:
    """Return everything that the mode needs, and whether it is there."""
    found = [await _sets(), await _tables()]
    if not await asyncio.to_thread(kernel.available):
        await load("ip_vs")
    if not await asyncio.to_thread(kernel.available):
        return (*found, Capability("ip_vs", False, "the kernel does not have it", REMEDY))
    found += await asyncio.to_thread(_trials, kernel, settings)
    found.append(await asyncio.to_thread(ipv6))
    there = (ROOT / CONNTRACK).exists()
    remedy = "a kernel with CONFIG_IP_VS_NFCT (Debian's has it)"
    found.append(Capability("net.ipv4.vs.conntrack", there, remedy="" if there else remedy))
    return tuple(found)


async def _sets() -> Capability:
    try:
        await IpSets().names()
    except Unsupported as error:
        return Capability("ipset", False, error.capability, error.remedy)
    except DataplaneError as error:
        return Capability("ipset", False, str(error), "modprobe ip_set")
    return Capability("ipset", True)


async def _tables() -> Capability:
    try:
        tools = await Xtables().find()
    except Unsupported as error:
        return Capability("iptables", False, error.capability, error.remedy)
    except DataplaneError as error:
        return Capability("iptables", False, str(error), INSTALL)
    return Capability("iptables", True, f"the {tools.in_use} variant")


async def load(name: str) -> None:
    """Try to load a kernel module; whether it worked is seen by using it."""
    tool = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:{_PATH}")
    if tool is None:
        return
    process = await asyncio.create_subprocess_exec(
        tool, "-q", name, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    await process.wait()


def _trials(kernel: Kernel, settings: IpvsSettings) -> list[Capability]:
    """Create and delete a virtual server of each kind, where nobody can have one."""
    name = settings.scheduler
    scheduler = f"modprobe {module(name)} (Debian: part of linux-image-amd64)"
    made = [_trial(kernel, module(name), Family.IPV4, Protocol.TCP, name, scheduler, needed=True)]
    if not made[0].present:
        return made
    remedy = "a kernel with CONFIG_IP_VS_PROTO_SCTP"
    made.append(_trial(kernel, SCTP, Family.IPV4, Protocol.SCTP, name, remedy))
    remedy = "a kernel with CONFIG_IP_VS_IPV6"
    made.append(_trial(kernel, IPV6, Family.IPV6, Protocol.TCP, name, remedy))
    return made


def _trial(
    kernel: Kernel,
    capability: str,
    family: Family,
    protocol: Protocol,
    scheduler: str,
    remedy: str,
    *,
    needed: bool = False,
) -> Capability:
    taken = kernel.services()
    address = _TEST_ADDRESS[family]
    service = next(
        one
        for port in range(20000, 65536)
        if (one := Service(family, protocol, address, port)) not in taken
    )
    manner = Manner(Scheduler(scheduler))
    try:
        failed = kernel.ipvs([Operation(ADD, service, manner)])
        kernel.ipvs([Operation(DELETE, service, manner)])
    except Unsupported as error:
        return Capability(capability, False, str(error), error.remedy, needed)
    except DataplaneError as error:
        return Capability(capability, False, str(error), remedy, needed)
    if failed:
        return Capability(capability, False, str(next(iter(failed.values()))), remedy, needed)
    return Capability(capability, True, needed=needed)
