"""The IPVS backend as the rest of vipd sees it: the functions of this folder under one name.

Lives here: nothing but the binding to backends/protocol.py, and what the mode does otherwise.
"""

from collections.abc import Iterable, Sequence

from vipd.backends.ipvs.compile import Program
from vipd.backends.ipvs.observed import Observed, dump, load
from vipd.backends.ipvs.plan import (
    IpvsPlan,
    compile_program,
    expected,
    plan,
    plan_changes,
    without,
)
from vipd.backends.ipvs.probe import IPV6, SCTP
from vipd.backends.ipvs.trace import trace
from vipd.backends.protocol import (
    AS_THE_TABLE_SAYS,
    NO_PROXY_PROTOCOL,
    Capabilities,
    Difference,
    Packet,
    Serving,
    Step,
)
from vipd.proxy.names import Family, Protocol
from vipd.proxy.settings import DataplaneSettings
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer

DIFFERENCES = (
    Difference(
        "random-is-scheduled",
        "algorithm random is served by the configured scheduler (rr unless said otherwise)",
    ),
    Difference(
        "affinity-by-address",
        "a client's endpoint is remembered for each address of a service, not for all together",
    ),
    Difference(
        "local-list-for-all",
        "under external policy Local, pods of this node and the node itself use this node's "
        "endpoints too, and the whole list only where it has none",
    ),
    Difference(
        "udp-moves-at-once",
        "a UDP flow goes to another endpoint as soon as its own leaves, terminating or not",
    ),
    Difference(
        "unknown-ports-are-refused",
        "a port that no service has, and a TCP connection that nobody knows, is refused on "
        "external and load-balancer addresses, too",
    ),
    Difference(
        "pings-are-answered",
        "this node answers pings to service addresses, which are its own in this mode",
    ),
    NO_PROXY_PROTOCOL,
)
_DEFAULT = DataplaneSettings()


class IpvsCompiler:
    """The pure half (see Compiler)."""

    mode = "ipvs"
    differences: Sequence[Difference] = DIFFERENCES
    portion: int | None = 1_000

    def __init__(self, settings: DataplaneSettings = _DEFAULT) -> None:
        self._settings = settings.ipvs

    def lacks(self, server: VirtualServer, capabilities: Capabilities) -> str:
        """Return why this mode cannot serve a virtual server here, or an empty text."""
        for one in capabilities.found:
            if one.present:
                continue
            if one.name == SCTP and server.key.protocol is Protocol.SCTP:
                return f"IPVS of this kernel has no SCTP ({one.remedy})"
            if one.name == IPV6 and server.key.family is Family.IPV6:
                return f"IPVS of this kernel has no IPv6 ({one.remedy})"
        return ""

    def compile(self, virtual_servers: Iterable[VirtualServer], network: NodeNetwork) -> Program:
        """Return the program that serves these virtual servers."""
        return compile_program(virtual_servers, network, self._settings.scheduler)

    def plan(self, observed: Observed | None, wanted: Program) -> tuple[IpvsPlan, Program]:
        """Return the plan from what the kernel has to `wanted`."""
        return plan(observed, wanted)

    def plan_changes(self, programmed: Program, changes: Changes) -> tuple[IpvsPlan, Program]:
        """Return the plan for one change, and the program after it."""
        return plan_changes(programmed, changes)

    def without(self, before: Program, after: Program, rejected: Iterable[Key]) -> Program:
        """Return `after`, with the rejected virtual servers as they were in `before`."""
        return without(before, after, rejected)

    def dump(self, program: Program) -> bytes:
        """Return `program` as JSON that `load` reads as an observation of it."""
        return dump(expected(program))

    def load(self, text: bytes) -> Observed:
        """Return what a kernel has that holds exactly the dumped program."""
        return load(text)

    def serving(self, program: Program, key: Key) -> Serving | None:
        """Return that it is served as the table says; None where the program does not have it."""
        return AS_THE_TABLE_SAYS if key in program.entries else None

    def trace(self, program: Program, packet: Packet) -> Sequence[Step]:
        """Return what the packet meets in this program, in order."""
        return trace(program, packet)
