"""The real kernel takes every program, and packets meet the very rules that the model says."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.statements import Packet
from tests.properties.wire import Node, needed
from tests.properties.worlds import OWN, packets, snapshot_of
from tests.properties.xtables import Way, Xtables, blocks, ways

from vipd.backends.iptables.backend import IptablesCompiler
from vipd.proxy.events import Event
from vipd.proxy.names import Family
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import fold

TABLES = ("raw", "mangle", "nat", "filter")
_SAVED = re.compile(r"\[([0-9]+):[0-9]+\] -A (\S+)")
_MISSING = needed("ip", "ipset", "iptables-legacy-restore", "iptables-nft-restore", "sysctl")
pytestmark = [
    pytest.mark.netns,
    pytest.mark.usefixtures("small_maglev"),
    pytest.mark.skipif(bool(_MISSING), reason=_MISSING),
]
Counts = Counter[tuple[str, str, int]]
"""Packets by table, chain and number of the rule."""


class RealTables:
    """iptables of one variant on a real node, filled with a plan's text."""

    def __init__(self, node: Node, variant: str) -> None:
        self.node, self.variant = node, variant
        self.before: Counts = Counter()

    def tool(self, family: Family, suffix: str) -> str:
        return f"ip{'6' if family is Family.IPV6 else ''}tables-{self.variant}-{suffix}"

    def clear(self) -> None:
        for family in Family:
            for table in TABLES:
                self.node.run(self.tool(family, "restore"), text=f"*{table}\nCOMMIT\n")
        for name in self.node.run("ipset", "list", "-name").split():
            self.node.run("ipset", "destroy", name)

    def run(self, text: str) -> None:
        for family, block in blocks(text):
            if family is None:
                self.node.run("ipset", "restore", text=block)
            else:
                restore = self.tool(family, "restore")
                self.node.run(restore, "--noflush", "--test", text=block)
                self.node.run(restore, "--noflush", text=block)

    def forget(self) -> None:
        """Forget clients and flows."""
        self.node.run("sh", "-c", "for one in /proc/net/xt_recent/*; do"
                      " [ ! -e $one ] || echo / > $one; done")  # fmt: skip

    def counts(self, family: Family) -> Counts:
        found: Counts = Counter()
        for table in TABLES:
            numbers: dict[str, Iterator[int]] = {}
            for line in self.node.run(self.tool(family, "save"), "-c", "-t", table).splitlines():
                if match := _SAVED.match(line):
                    number = next(numbers.setdefault(match[2], count()))
                    found[table, match[2], number] = int(match[1])
        return found


@pytest.fixture(scope="module", params=("legacy", "nft"))
def real(request: pytest.FixtureRequest) -> Iterator[RealTables]:
    """Return tables in a network namespace of their own."""
    node = Node(f"vipd-eqv-{os.getpid()}")
    yield RealTables(node, request.param)
    node.close()


@settings(max_examples=max(4, settings.default.max_examples // 10))  # type: ignore[union-attr]
@given(some.clusters(), st.lists(some.events, max_size=4), some.node_settings, st.data())
def test_the_kernel_does_what_the_model_says(
    real: RealTables, first: list[Event], later: list[Event], node: NodeSettings,
    data: st.DataObject,
) -> None:  # fmt: skip
    compiler, model = IptablesCompiler(), Xtables()
    real.clear()
    snapshot = snapshot_of(first)
    table = resolve(snapshot, node)
    compiled = compiler.compile(table.virtual_servers(), table.network)
    made, program = compiler.plan(None, compiled)
    snapshot, touched = fold(snapshot, later)
    table, changes = update(table, snapshot, node, touched)
    for text in (str(made), str(compiler.plan_changes(program, changes)[0])):
        model.run(text)
        real.run(text)
    sent = data.draw(st.lists(packets(table).filter(_possible), min_size=10, max_size=20))
    before = {family: real.counts(family) for family in Family}
    for drawn in sent:
        packet = drawn._replace(source_port=next(real.node.source_ports))
        packet = packet._replace(mark=0) if packet.interface else packet
        real.forget()
        expected = ways(model, packet, OWN)
        real.node.send(packet)
        after = real.counts(packet.family)
        met = after - before[packet.family]
        before[packet.family] = after
        assert met in [Counter(one.path) for one in expected], _told(packet, met, expected)


def _possible(packet: Packet) -> bool:
    """Return whether such a packet can be: none from or to loopback, but on the node itself."""
    if packet.source.is_loopback:
        return False
    return not (packet.interface and packet.destination.is_loopback)


def _told(packet: Packet, met: Counts, expected: list[Way]) -> str:
    lines = [str(packet), f"met: {sorted(met.items())}"]
    return "\n".join([*lines, *(f"or: {one.outcome} {one.path}" for one in expected)])
