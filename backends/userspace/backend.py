"""The userspace backend as the rest of vipd sees it: the functions of this folder under one name.

Lives here: nothing but the binding to backends/protocol.py, and what the mode does otherwise.
"""

from collections.abc import Iterable, Sequence

from vipd.backends.protocol import Capabilities, Difference, Packet, Serving, Step
from vipd.backends.userspace.compile import serving
from vipd.backends.userspace.observed import Observed, dump, load
from vipd.backends.userspace.operations import UserspacePlan
from vipd.backends.userspace.plan import (
    compile_program,
    expected,
    plan,
    plan_changes,
    without,
)
from vipd.backends.userspace.program import Program
from vipd.backends.userspace.trace import trace
from vipd.proxy.names import Protocol
from vipd.proxy.settings import DataplaneSettings
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer

_DEFAULT = DataplaneSettings()
DIFFERENCES = (
    Difference(
        "source-is-the-node",
        "endpoints see an address of this node, whoever the client is",
    ),
    Difference(
        "no-sctp",
        "SCTP is not forwarded: its ports are nobody's, and are reported",
    ),
    Difference(
        "affinity-by-address",
        "a client's endpoint is remembered for each address of a service, not for all together",
    ),
    Difference(
        "unknown-ports-are-refused",
        "a port that no service has, a ping, and a TCP connection that nobody knows, is refused "
        "on external and load-balancer addresses, too",
    ),
    Difference(
        "ports-of-the-node",
        "a port that a program of the node has on all addresses cannot be a service's, and such a "
        "program cannot be started while a service has its port",
    ),
    Difference(
        "no-link-local-node-ports",
        "node ports are not answered on link-local addresses of IPv6",
    ),
    Difference(
        "failing-endpoints-are-set-aside",
        "an endpoint that refuses or times out gets no new connection for a while, unless its "
        "Service has annotation vipd/keep-failing-endpoints",
    ),
)


TRANSPARENT_DIFFERENCES = (
    Difference(
        "source-is-the-node",
        "endpoints on other nodes, and at addresses of this node, see an address of this node, "
        "whoever the client is",
    ),
    *DIFFERENCES[1:],
)
"""With `userspace.transparent`."""


class UserspaceCompiler:
    """The pure half (see Compiler)."""

    mode = "userspace"
    portion: int | None = 1_000

    def __init__(self, settings: DataplaneSettings = _DEFAULT) -> None:
        self._mark = settings.userspace.mark
        self.differences: Sequence[Difference] = (
            TRANSPARENT_DIFFERENCES if self._mark else DIFFERENCES
        )

    def lacks(self, server: VirtualServer, capabilities: Capabilities) -> str:
        """Return why this mode cannot serve a virtual server here, or an empty text."""
        if server.key.protocol is Protocol.SCTP:
            return "userspace mode forwards TCP and UDP only"
        return ""

    def compile(self, virtual_servers: Iterable[VirtualServer], network: NodeNetwork) -> Program:
        """Return the program that serves these virtual servers."""
        return compile_program(virtual_servers, network, self._mark)

    def plan(self, observed: Observed | None, wanted: Program) -> tuple[UserspacePlan, Program]:
        """Return the plan from what there is to `wanted`."""
        return plan(observed, wanted)

    def plan_changes(self, programmed: Program, changes: Changes) -> tuple[UserspacePlan, Program]:
        """Return the plan for one change, and the program after it."""
        return plan_changes(programmed, changes)

    def without(self, before: Program, after: Program, rejected: Iterable[Key]) -> Program:
        """Return `after`, with the rejected virtual servers as they were in `before`."""
        return without(before, after, rejected)

    def dump(self, program: Program) -> bytes:
        """Return `program` as JSON that `load` reads as an observation of it."""
        return dump(expected(program))

    def load(self, text: bytes) -> Observed:
        """Return what there is where exactly the dumped program is served."""
        return load(text)

    def serving(self, program: Program, key: Key) -> Serving | None:
        """Return how the program serves a virtual server; None where it does not have it."""
        return serving(program, key)

    def trace(self, program: Program, packet: Packet) -> Sequence[Step]:
        """Return what the packet meets in this program, in order."""
        return trace(program, packet)
