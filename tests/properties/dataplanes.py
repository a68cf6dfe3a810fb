"""Every backend's compiler with the model of its kernel, under one interface.

Lives here: what the property tests that hold for all backends are parametrised by. Must not: know
what a program should do.
"""

import typing
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

from tests.properties import ipvs, packets, userspace, xtables
from tests.properties.kernel import Kernel
from tests.properties.oracle import Shares
from tests.properties.statements import Packet

from vipd.backends.iptables.backend import IptablesCompiler
from vipd.backends.ipvs.backend import IpvsCompiler
from vipd.backends.ipvs.plan import IpvsPlan
from vipd.backends.nftables.backend import NftablesCompiler
from vipd.backends.nftables.plan import NftPlan, discard, transaction
from vipd.backends.protocol import Capabilities, Compiler, Plan
from vipd.backends.userspace.backend import UserspaceCompiler
from vipd.backends.userspace.operations import UserspacePlan
from vipd.proxy.names import Address
from vipd.proxy.virtualserver import VirtualServer


class Modelled(typing.Protocol):
    """A kernel with one dataplane in it."""

    def commit(self, plan: Plan) -> None:
        """Do a plan as the driver does, with what waits for old connections."""

    def steps(self, plan: Plan) -> Iterator[object]:
        """Do a plan, and stop wherever the kernel may let packets through in between."""

    def chances(self, packet: Packet, own: frozenset[Address]) -> Shares:
        """Return what becomes of a packet."""

    def state(self) -> object:
        """Return everything of ours that it holds, to be compared."""


class Nftables:
    """nftables; see kernel.py."""

    def __init__(self) -> None:
        self.kernel = Kernel()

    def commit(self, plan: Plan) -> None:
        assert isinstance(plan, NftPlan)
        if plan.whole:
            self.kernel.run(str(plan))
        else:
            self.kernel.run(transaction(plan.prologue, plan.units))
            self.kernel.run(discard(plan.garbage))

    def steps(self, plan: Plan) -> Iterator[object]:
        assert isinstance(plan, NftPlan)
        if plan.whole:
            texts = [str(plan)]
        else:
            units = [transaction((), [unit]) for unit in plan.units]
            texts = [transaction(plan.prologue, ()), *units, discard(plan.garbage)]
        for text in texts:
            self.kernel.run(text)
            yield text

    def chances(self, packet: Packet, own: frozenset[Address]) -> Shares:
        return packets.chances(self.kernel, packet, own)

    def state(self) -> object:
        return self.kernel.tables


class Ipvs:
    """IPVS; see ipvs.py."""

    def __init__(self) -> None:
        self.kernel = ipvs.Ipvs()

    def commit(self, plan: Plan) -> None:
        assert isinstance(plan, IpvsPlan)
        self.kernel.run(str(plan))

    def steps(self, plan: Plan) -> Iterator[object]:
        return self.kernel.steps(str(plan))

    def chances(self, packet: Packet, own: frozenset[Address]) -> Shares:
        return ipvs.ways(self.kernel, packet, own)

    def state(self) -> object:
        return self.kernel.routes, self.kernel.servers, xtables.state(self.kernel.xtables)


class Iptables:
    """iptables; see xtables.py."""

    def __init__(self) -> None:
        self.kernel = xtables.Xtables()

    def commit(self, plan: Plan) -> None:
        self.kernel.run(str(plan))

    def steps(self, plan: Plan) -> Iterator[object]:
        return self.kernel.steps(str(plan))

    def chances(self, packet: Packet, own: frozenset[Address]) -> Shares:
        found: Shares = {}
        for one in xtables.ways(self.kernel, packet, own):
            found[one.outcome] = found.get(one.outcome, Fraction(0)) + one.probability
        return found

    def state(self) -> object:
        return xtables.state(self.kernel)


class Userspace:
    """Userspace; see userspace.py."""

    def __init__(self) -> None:
        self.node = userspace.Userspace()

    def commit(self, plan: Plan) -> None:
        assert isinstance(plan, UserspacePlan)
        self.node.run(plan)

    def steps(self, plan: Plan) -> Iterator[object]:
        assert isinstance(plan, UserspacePlan)
        return self.node.steps(plan)

    def chances(self, packet: Packet, own: frozenset[Address]) -> Shares:
        return self.node.chances(packet, own)

    def state(self) -> object:
        return self.node.state()


class Dataplane(typing.NamedTuple):
    """A mode: its compiler, and a kernel with nothing in it."""

    compiler: Compiler[Any, Any, Any]
    kernel: Callable[[], Modelled]

    @property
    def mode(self) -> str:
        return self.compiler.mode

    def differs(self, name: str) -> bool:
        """Return whether the mode says that it does this otherwise than the table."""
        return any(one.name == name for one in self.compiler.differences)

    def lacks(self, server: VirtualServer) -> bool:
        """Return whether the mode cannot serve a virtual server at all."""
        return bool(self.compiler.lacks(server, Capabilities(self.mode, ())))

    def holding(self, program: Any) -> Modelled:
        """Return a kernel that holds just this program."""
        kernel = self.kernel()
        kernel.commit(self.compiler.plan(None, program)[0])
        return kernel


DATAPLANES: Iterable[Dataplane] = (
    Dataplane(NftablesCompiler(), Nftables),
    Dataplane(IptablesCompiler(), Iptables),
    Dataplane(IpvsCompiler(), Ipvs),
    Dataplane(UserspaceCompiler(), Userspace),
)
