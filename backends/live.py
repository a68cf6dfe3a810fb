"""What the kernel knows of one packet's connections: the rest of `vipd explain --live`.

Lives here: the record of it, and what connection tracking knows, in words; the counters and the
memory of each mode are in its own live.py. Must not: change anything, or tell more than what
concerns the packet.
"""

from collections.abc import Sequence
from typing import Any

from msgspec import structs

from vipd.backends import conntrack
from vipd.backends.protocol import Known, Packet
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import family_of
from vipd.proxy.virtualserver import Key
from vipd.proxy.words import counted

MOST_FLOWS = 10
_STATES = (
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
)
_TRANSLATED_BY = {0x4E: "nftables", 0x49: "iptables"}
"""The modes that leave their generation in the first byte of a mark."""


async def known(mode: str, program: Any, packet: Packet, driver: object = None) -> Known:
    """Return what the kernel of this network namespace knows; needs root.

    Counters, the endpoint that affinity remembers, and the flows of the same source to the same
    destination. What cannot be read is a line too. `driver` is that of the dataplane that serves in
    this mode, where there is one: in userspace mode only it can ask.
    """
    told = await _of_mode(mode, program, packet, driver)
    return structs.replace(told, lines=(*told.lines, *await _flows(packet)))


async def _of_mode(mode: str, program: Any, packet: Packet, driver: object) -> Known:
    match mode:
        case "nftables":
            from vipd.backends.nftables import live as nftables

            return await nftables.counters(program, packet)
        case "iptables":
            from vipd.backends.iptables import live as iptables

            return await iptables.counters(program, packet)
        case "ipvs":
            from vipd.backends.ipvs import live as ipvs

            return await ipvs.counters(program, packet)
        case "userspace":
            from vipd.backends.userspace import live as userspace

            return await userspace.counters(program, packet, driver)
        case _:
            return Known(())


async def _flows(packet: Packet) -> Sequence[str]:
    """Return a line for each tracked flow of the packet's source and original destination."""
    to = packet.destination
    try:
        found = await conntrack.entries(
            packet.source, Key(family_of(to), to, packet.protocol, packet.port)
        )
    except DataplaneError as error:
        return [f"flows are not known: {error}"]
    shown = [_flow(one) for one in found[:MOST_FLOWS]]
    if len(found) > MOST_FLOWS:
        shown.append(f"and {counted(len(found) - MOST_FLOWS, 'flow')} more")
    return shown or [f"no flow of {packet.source} to this destination is tracked"]


def _flow(one: conntrack.Flow) -> str:
    state = "replied to" if one.replied else "no reply yet"
    if one.state is not None and one.state < len(_STATES):
        state = _STATES[one.state]
    by = _TRANSLATED_BY.get(one.mark >> 24)
    mark = f", mark {one.mark:#x}" if one.mark else ""
    return (
        f"flow, source port {one.client_port}: to {one.answering}, {state}, "
        f"{one.seconds} s left{mark}" + (f" ({by})" if by else "")
    )
