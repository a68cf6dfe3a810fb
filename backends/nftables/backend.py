"""The nftables backend as the rest of vipd sees it: the functions of this folder under one name.

Lives here: nothing but the binding to backends/protocol.py.
"""

from collections.abc import Iterable, Sequence

from vipd.backends.nftables.compile import Program
from vipd.backends.nftables.observed import Observed, dump, load
from vipd.backends.nftables.plan import (
    NftPlan,
    compile_program,
    expected,
    plan,
    plan_changes,
    without,
)
from vipd.backends.nftables.trace import trace
from vipd.backends.protocol import (
    AS_THE_TABLE_SAYS,
    NO_PROXY_PROTOCOL,
    Capabilities,
    Difference,
    Packet,
    Serving,
    Step,
)
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer


class NftablesCompiler:
    """The pure half (see Compiler)."""

    mode = "nftables"
    differences: Sequence[Difference] = (
        Difference("nftables-least-connections", "algorithm least-connections is served as random"),
        NO_PROXY_PROTOCOL,
    )
    portion: int | None = 1_000
    """Enough for nft to run for a while, while the next portion is compiled."""

    def lacks(self, server: VirtualServer, capabilities: Capabilities) -> str:
        """Return an empty text: it serves every virtual server there can be."""
        return ""

    def compile(self, virtual_servers: Iterable[VirtualServer], network: NodeNetwork) -> Program:
        """Return the program that serves these virtual servers."""
        return compile_program(virtual_servers, network)

    def plan(self, observed: Observed | None, wanted: Program) -> tuple[NftPlan, Program]:
        """Return the plan from what the kernel has to `wanted`, and the program with slots kept."""
        return plan(observed, wanted)

    def plan_changes(self, programmed: Program, changes: Changes) -> tuple[NftPlan, Program]:
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
