"""What a dataplane is to the rest of vipd: a pure half and a driver.

Lives here: the interface and the records that cross it. Must not: know any one dataplane. A backend
adds objects, compile, plan and driver in a folder of its own.
"""

import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from msgspec import Struct

from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import Address, Protocol
from vipd.proxy.virtualserver import Changes, Endpoint, Key, NodeNetwork, VirtualServer


class Capability(Struct, frozen=True):
    """One thing a mode needs from the host, and whether it is there.

    `remedy` says which package or kernel module brings it; `needed` is false for what vipd can do
    without.
    """

    name: str
    present: bool
    detail: str = ""
    remedy: str = ""
    needed: bool = True


class Capabilities(Struct, frozen=True):
    """What `probe` found for one mode."""

    mode: str
    found: tuple[Capability, ...]

    @property
    def supported(self) -> bool:
        """Whether everything needed is there."""
        return all(one.present or not one.needed for one in self.found)


class Difference(Struct, frozen=True):
    """Something that a mode does otherwise than the table says, because its dataplane cannot.

    `vipd check` prints it, and the test that compares the modes allows for it by its name.
    """

    name: str
    what: str


class Serving(Struct, frozen=True, kw_only=True):
    """How a program serves one virtual server, as far as that is otherwise than the table says."""

    refusal: str = ""
    """Why it is not served, or not as it should be."""
    served: bool = True
    """False: its address and port are nobody's in this mode."""
    passed_over: tuple[tuple[Endpoint, str], ...] = ()
    """Endpoints that never get a connection, each with the reason."""
    connected: tuple[Endpoint, ...] = ()
    """Endpoints that processes of this node connect to: they see an address of the node,
    whoever the client is."""


AS_THE_TABLE_SAYS = Serving()

NO_PROXY_PROTOCOL = Difference(
    "no-proxy-protocol",
    "annotation vipd/proxy-protocol has no effect: endpoints get what clients send, and nothing "
    "before it",
)
"""Of the modes in which the kernel forwards packets: it cannot write into a connection."""


class Packet(Struct, frozen=True, kw_only=True):
    """The first packet of a connection, as `explain` follows it.

    `from_node` tells that the node itself sends it, `to_node` that the destination is an address of
    the node's own (what a kernel calls local); `interface` is where it comes in (empty for the node
    itself, and where nobody said).
    """

    source: Address
    destination: Address
    protocol: Protocol
    port: int
    source_port: int = 0
    from_node: bool = False
    to_node: bool = False
    interface: str = ""


class Step(Struct, frozen=True):
    """One thing that a packet meets: `where` it stands, `what` stands there, what comes of it."""

    where: str
    what: str
    outcome: str = ""


class Known(Struct, frozen=True):
    """What the kernel knows, a line each; `remembered` is where affinity sends the source.

    `passed_over` are endpoints that get no new connection now, each with the reason.
    """

    lines: tuple[str, ...]
    remembered: Endpoint | None = None
    passed_over: tuple[tuple[Endpoint, str], ...] = ()


class Departed(Struct, frozen=True):
    """An endpoint that a virtual server no longer has, and whose flows have had their time."""

    key: Key
    address: Address
    port: int


class Flows(Struct, frozen=True):
    """Established flows that still depend on a dataplane, by virtual server (as its key prints)."""

    by_server: dict[str, int]

    @property
    def total(self) -> int:
        """Return the number of all flows."""
        return sum(self.by_server.values())


class Plan(typing.Protocol):
    """What a commit would change. Prints as text: the golden file and the dry run."""

    def __bool__(self) -> bool:
        """Return whether there is anything to change."""

    def __str__(self) -> str:
        """Return the whole plan as the dataplane's own tool would be told it."""

    def due(self, rejected: Collection[Key] = ()) -> bool:
        """Return whether the kernel is otherwise than wanted now: what only waits to be removed, or
        is left for later use, does not count, nor that the `rejected` cannot be done."""

    @property
    def size(self) -> int:
        """Return the number of kernel objects that are added or removed."""


ProgramT = TypeVar("ProgramT")
PlanOut = TypeVar("PlanOut", bound=Plan, covariant=True)
PlanIn = TypeVar("PlanIn", bound=Plan, contravariant=True)
ObservedOut = TypeVar("ObservedOut", covariant=True)
ObservedT = TypeVar("ObservedT")


class Committed(Struct, frozen=True):
    """What a commit did: the virtual servers it could not program, each with the reason.

    Everything else of the plan is in the kernel.
    """

    rejected: dict[Key, DataplaneError]
    withdrawn: Mapping[Key, DataplaneError] = {}
    """What earlier commits said of virtual servers and is true no longer, as others changed."""


class Compiler(typing.Protocol[ProgramT, PlanOut, ObservedT]):
    """The pure half: what should be in the kernel, and how to get there. No I/O, no clock."""

    mode: str
    differences: Sequence[Difference]
    portion: int | None
    """Virtual servers that are planned and committed together where the kernel has nothing yet;
    None where one commit of everything is best."""

    def lacks(self, server: VirtualServer, capabilities: Capabilities) -> str:
        """Return why this mode cannot serve a virtual server here, or an empty text when it can.

        What it serves, but otherwise than the table says, is a difference and no lack.
        """

    def compile(self, virtual_servers: Iterable[VirtualServer], network: NodeNetwork) -> ProgramT:
        """Return the program that serves these virtual servers."""

    def plan(self, observed: ObservedT | None, wanted: ProgramT) -> tuple[PlanOut, ProgramT]:
        """Return the plan from what the kernel has (None: nothing) to `wanted`.

        The second value is the program as it will be: `wanted`, with what history decides (which
        endpoint holds which slot) taken over from the kernel. O(everything).
        """

    def plan_changes(self, programmed: ProgramT, changes: Changes) -> tuple[PlanOut, ProgramT]:
        """Return the plan for one change, and the program after it. O(change)."""

    def without(self, before: ProgramT, after: ProgramT, rejected: Iterable[Key]) -> ProgramT:
        """Return `after`, with the rejected virtual servers as they were in `before`."""

    def dump(self, program: ProgramT) -> bytes:
        """Return `program` as JSON that `load` reads as an observation of it."""

    def load(self, text: bytes) -> ObservedT:
        """Return what a kernel has that holds exactly the dumped program."""

    def serving(self, program: ProgramT, key: Key) -> Serving | None:
        """Return how the program serves a virtual server; None where it does not have it."""

    def trace(self, program: ProgramT, packet: Packet) -> Sequence[Step]:
        """Return what the packet meets in this program, in order. Follows no chance: a choice among
        endpoints is one step."""


class Driver(typing.Protocol[PlanIn, ObservedOut]):
    """The effect half: the one place where a dataplane touches the kernel.

    Every error is a `DataplaneError` with its retry class; anything else is a bug.
    """

    async def probe(self) -> Capabilities:
        """Return what this host has and lacks for the mode. Changes nothing."""

    async def observe(self) -> ObservedOut | None:
        """Return what the kernel has of ours, or None when there is nothing."""

    async def commit(self, plan: PlanIn) -> Committed:
        """Do the plan. A virtual server that is rejected does not keep the others out.

        May be called again before it returns, for plans about other virtual servers.
        """

    async def quiesce(self) -> None:
        """Take no new flow from now on; established ones go on. Idempotent; undone by a commit.

        Another dataplane serves every virtual server already when this is called.
        """

    async def flows(self) -> Flows:
        """Return the established flows that this dataplane still carries."""

    async def cut(self, departed: Sequence[Departed]) -> int:
        """Forget endpoints that were kept for their old flows only; return how many flows it ended.

        Connection tracking is not this driver's: those who call it end the flows there, and count
        them."""

    async def leftovers(self) -> Sequence[str]:
        """Return what `teardown` would remove, in its words. Changes nothing."""

    async def teardown(self) -> Sequence[str]:
        """Remove everything of this mode and say what it was. Idempotent. The skeleton stays."""


@typing.runtime_checkable
class SettingUp(typing.Protocol):
    """A driver whose mode needs settings of the kernel (sysctls) that are not its own objects."""

    async def set_up(self) -> Sequence[str]:
        """Set them; return a sentence for each that could not be set. Recorded for `teardown`."""
