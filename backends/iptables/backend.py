"""The iptables backend as the rest of vipd sees it: the functions of this folder under one name.

Lives here: nothing but the binding to backends/protocol.py, and what this mode does otherwise.
"""

from collections.abc import Iterable, Sequence

from vipd.backends.iptables import balance, observed
from vipd.backends.iptables import plan as planning
from vipd.backends.iptables.compile import Program, program
from vipd.backends.iptables.observed import Observed
from vipd.backends.iptables.plan import IptablesPlan
from vipd.backends.iptables.trace import trace
from vipd.backends.protocol import (
    AS_THE_TABLE_SAYS,
    NO_PROXY_PROTOCOL,
    Capabilities,
    Difference,
    Packet,
    Serving,
    Step,
)
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family
from vipd.proxy.settings import DataplaneSettings
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer

DIFFERENCES = (
    Difference("iptables-least-connections", "algorithm least-connections is served as random"),
    Difference("iptables-maglev", "algorithm maglev is served as random: there is no such match"),
    Difference(
        "iptables-round-robin",
        "with the legacy variant, round-robin begins again with each commit; with more than "
        f"{balance.MOST_TURNS} turns in a round it is served as random",
    ),
    Difference(
        "iptables-source-hash",
        f"source-hash: shares of more than {balance.MOST_NODES} slots are fair within a few per "
        "cent (xt_cluster), and a source may have another endpoint than in nftables mode",
    ),
    Difference(
        "iptables-affinity",
        "affinity remembers the last 100 clients of each endpoint (xt_recent's ip_list_tot)",
    ),
    NO_PROXY_PROTOCOL,
)


class IptablesCompiler:
    """The pure half (see Compiler)."""

    mode = "iptables"
    differences: Sequence[Difference] = DIFFERENCES
    portion: int | None = None

    def __init__(self, settings: DataplaneSettings | None = None) -> None:
        """Nothing of the settings matters here."""

    def lacks(self, server: VirtualServer, capabilities: Capabilities) -> str:
        """Return why this mode cannot serve a virtual server here, or an empty text."""
        missing = {one.name: one for one in capabilities.found if not one.present}
        needed = []
        if server.key.family is Family.IPV6:
            needed.append("ip6tables")
        if server.affinity_seconds is not None:
            needed.append("match recent")
        if server.algorithm is Algorithm.SOURCE_HASH:
            needed.append("match cluster")
        lacking = [missing[one] for one in needed if one in missing]
        return "; ".join(f"{one.name} is missing: {one.remedy}" for one in lacking)

    def compile(self, virtual_servers: Iterable[VirtualServer], network: NodeNetwork) -> Program:
        """Return the program that serves these virtual servers."""
        return program(virtual_servers, network)

    def plan(self, seen: Observed | None, wanted: Program) -> tuple[IptablesPlan, Program]:
        """Return the plan from what the kernel has to `wanted`, and `wanted`."""
        return planning.plan(seen, wanted)

    def plan_changes(self, programmed: Program, changes: Changes) -> tuple[IptablesPlan, Program]:
        """Return the plan for one change, and the program after it."""
        return planning.plan_changes(programmed, changes)

    def without(self, before: Program, after: Program, rejected: Iterable[Key]) -> Program:
        """Return `after`, with the rejected virtual servers as they were in `before`."""
        return planning.without(before, after, rejected)

    def dump(self, program: Program) -> bytes:
        """Return `program` as JSON that `load` reads as an observation of it."""
        return observed.dump(observed.expected(program))

    def load(self, text: bytes) -> Observed:
        """Return what a kernel has that holds exactly the dumped program."""
        return observed.load(text)

    def serving(self, program: Program, key: Key) -> Serving | None:
        """Return that it is served as the table says; None where the program does not have it."""
        return AS_THE_TABLE_SAYS if key in program.servers else None

    def trace(self, program: Program, packet: Packet) -> Sequence[Step]:
        """Return what the packet meets in this program, in order."""
        return trace(program, packet)
