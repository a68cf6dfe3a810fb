"""What a dataplane is to the rest of vipd: a pure half and a driver.

Lives here: the interface and the records that cross it. Must not: know any one dataplane. A backend
adds objects, compile, plan and driver in a folder of its own.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct

from vipd.proxy.errors import DataplaneError
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer


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


class Plan(Protocol):
    """What a commit would change. Prints as text: the golden file and the dry run."""

    def __bool__(self) -> bool:
        """Return whether there is anything to change."""

    def __str__(self) -> str:
        """Return the whole plan as the dataplane's own tool would be told it."""

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


class Compiler(Protocol[ProgramT, PlanOut, ObservedT]):
    """The pure half: what should be in the kernel, and how to get there. No I/O, no clock."""

    mode: str

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


class Driver(Protocol[PlanIn, ObservedOut]):
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

    async def teardown(self) -> Sequence[str]:
        """Remove everything of ours and say what it was. Idempotent."""
