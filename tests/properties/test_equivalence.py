"""Every backend does to every packet what the table says, with the same chances, but for the
differences that it names."""

from collections.abc import Iterable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.dataplanes import DATAPLANES, Dataplane
from tests.properties.oracle import Outcome, Shares, addressed, shares
from tests.properties.statements import Packet
from tests.properties.worlds import OWN, packets, snapshot_of, winners

from vipd.backends import slots
from vipd.proxy.events import Event
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Address
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import fold
from vipd.proxy.virtualserver import Table, Use, VirtualServer

pytestmark = [
    pytest.mark.usefixtures("small_maglev"),
    pytest.mark.parametrize("plane", DATAPLANES, ids=lambda one: one.mode),
]
SOURCE_HASH_SLOTS = 256
"""Of IPVS."""
ROUNDING = Fraction(1, 1 << 20)
"""iptables keeps probabilities in 31 bits, and takes one of what another left."""


@given(some.clusters(), st.lists(some.events, max_size=4), some.node_settings, st.data())
def test_program_and_table_agree(
    plane: Dataplane, first: list[Event], later: list[Event], node: NodeSettings,
    data: st.DataObject,
) -> None:  # fmt: skip
    snapshot = snapshot_of(first)
    table = resolve(snapshot, node)
    compiler, kernel = plane.compiler, plane.kernel()
    compiled = compiler.compile(table.virtual_servers(), table.network)
    made, program = compiler.plan(None, compiled)
    kernel.commit(made)
    snapshot, touched = fold(snapshot, later)
    table, changes = update(table, snapshot, node, touched)
    kernel.commit(compiler.plan_changes(program, changes)[0])
    for packet in data.draw(st.lists(packets(table), min_size=10, max_size=20)):
        got, wanted = kernel.chances(packet, OWN), shares(table, packet, OWN)
        server = addressed(table, packet, OWN)
        if any(plane.lacks(one) for one in _on(table, packet.destination)):
            continue
        allowed = [wanted, *_different(plane, table, packet, server)]
        if plane.differs("source-is-the-node"):
            allowed = [_from_the_node(one) for one in allowed]
        slot = _slot(plane, server)
        assert any(_same(got, one, slot) for one in allowed), _told(packet, server, got, wanted)


@given(
    some.clusters(), st.lists(some.events, min_size=1, max_size=4), some.node_settings, st.data()
)
def test_in_the_middle_of_a_plan_what_is_served_stays_served_and_nothing_slips_through(
    plane: Dataplane, first: list[Event], later: list[Event], node: NodeSettings,
    data: st.DataObject,
) -> None:  # fmt: skip
    snapshot = snapshot_of(first)
    before = resolve(snapshot, node)
    compiler, kernel = plane.compiler, plane.kernel()
    made, program = compiler.plan(None, compiler.compile(before.virtual_servers(), before.network))
    kernel.commit(made)
    snapshot, touched = fold(snapshot, later)
    after, changes = update(before, snapshot, node, touched)
    made, program = compiler.plan_changes(program, changes)
    if not made:
        return
    sent = [
        *data.draw(st.lists(packets(before), max_size=5)),
        *data.draw(st.lists(packets(after), min_size=1, max_size=5)),
    ]
    was = [kernel.chances(packet, OWN).keys() for packet in sent]
    wanted = plane.holding(program)
    then = [wanted.chances(packet, OWN).keys() for packet in sent]
    for step in kernel.steps(made):
        for packet, old, new in zip(sent, was, then, strict=True):
            got = {*kernel.chances(packet, OWN)}
            if _may_pass(plane, old, new):
                got -= {Outcome("pass")}
            assert not _gap(got, old, new), f"{packet}\n{step}\n{made}\n{got}\n{old}\n{new}"


def _may_pass(plane: Dataplane, old: Iterable[Outcome], new: Iterable[Outcome]) -> bool:
    """Return whether a packet passes the mode for the time of one message.

    An address that comes or goes and whose range is dropped: its guard is there before and after
    its route, and tells the drop that a service has it. In IPVS mode also a virtual server that
    comes to a guarded address: the record that it is ours stands before it, and the guard goes by
    that record.
    """
    verdicts = ({one.verdict for one in old}, {one.verdict for one in new})
    comes = verdicts == ({"reject"}, {"dnat"})
    return plane.mode == "ipvs" and (comes or {"drop"} in verdicts)


def _on(table: Table, address: Address) -> list[VirtualServer]:
    return [one for key, one in winners(table).items() if address in (key.address, *OWN)]


def _from_the_node(wanted: Shares) -> Shares:
    """Return the same where every connection is made anew by this node."""
    own = {str(one) for one in OWN}
    found: Shares = {}
    for one, part in wanted.items():
        here = one.target.partition(" . ")[0] in own
        changed = one._replace(masqueraded=True) if one.target and not here else one
        found[changed] = found.get(changed, Fraction(0)) + part
    return found


def _gap(got: Iterable[Outcome], old: Iterable[Outcome], new: Iterable[Outcome]) -> bool:
    """Return whether a packet meets in between what it may not; to be refused it may, unless it is
    served before and after."""
    known = {*old, *new}
    served = all(one.verdict == "dnat" for one in known)
    if Outcome("pass") in known:  # whose source it has then does not matter
        known.add(Outcome("pass", masqueraded=True))
    return any(
        one not in known and (served or one.verdict not in ("reject", "drop")) for one in got
    )


def _same(got: Shares, wanted: Shares, slot: Fraction) -> bool:
    return got.keys() == wanted.keys() and all(
        abs(got[one] - wanted[one]) <= slot for one in wanted
    )


def _told(packet: Packet, server: VirtualServer | None, got: Shares, wanted: Shares) -> str:
    def told(shares: Shares) -> str:
        return ", ".join(f"{tuple(one)} {float(part):.5f}" for one, part in sorted(shares.items()))

    return f"{packet}\n{server}\ngot: {told(got)}\nthe table says: {told(wanted)}"


def _slot(plane: Dataplane, server: VirtualServer | None) -> Fraction:
    """Return by how much an endpoint's share may be off: one slot for each of its weight."""
    if server is None:
        return ROUNDING
    heaviest = max((one.weight for one in (*server.cluster, *server.local)), default=1)
    if plane.mode == "ipvs" and server.scheduler == "sh":
        return Fraction(heaviest, SOURCE_HASH_SLOTS)
    if server.algorithm is Algorithm.MAGLEV and not plane.differs("iptables-maglev"):
        return Fraction(heaviest, slots.MAGLEV_SIZES[0])
    if plane.mode == "ipvs" and server.algorithm is Algorithm.SOURCE_HASH:
        return Fraction(heaviest, SOURCE_HASH_SLOTS)
    return ROUNDING


def _different(
    plane: Dataplane, table: Table, packet: Packet, server: VirtualServer | None
) -> list[Shares]:
    """Return what else may become of the packet, by the differences that the mode names."""
    passes, refused = ({Outcome(one): Fraction(1)} for one in ("pass", "reject"))
    addresses = {key.address for key in winners(table)} - {None}
    if server is None:
        if packet.destination in addresses:
            no_port = packet.protocol not in ("tcp", "udp", "sctp")
            if no_port and plane.differs("pings-are-answered"):
                return [passes]
            foreign = plane.differs("unknown-ports-are-refused") and packet.destination not in OWN
            return [refused] if foreign else []
        return [passes] if plane.differs("unallocated-addresses-pass") else []
    if packet.protocol == "tcp" and not packet.syn:
        return [refused] if plane.differs("unknown-ports-are-refused") else []
    others: list[Shares] = []
    if server.use is Use.LOCAL_FROM_OUTSIDE and plane.differs("local-list-for-all"):
        others = _from_local_list(table, packet, server)
    if plane.mode == "ipvs" and server.scheduler in ("rr", "lc"):  # they know no weights
        wanted = [shares(table, packet, OWN), *others]
        others += [{each: Fraction(1, len(one)) for each in one} for one in wanted]
    return others


def _from_local_list(table: Table, packet: Packet, server: VirtualServer) -> list[Shares]:
    """Return what the mode does where it cannot tell sources apart: local endpoints, if any."""
    if not server.local:
        return []
    wanted = shares(table, packet, OWN)
    local = {f"{one.address} . {one.port}": one.weight for one in server.local}
    kept = {one: local[one.target] for one in wanted if one.target in local}
    total = sum(kept.values())
    return [{one: Fraction(weight, total) for one, weight in kept.items()}] if kept else []
