"""Each file in resolve/ is a cluster and the table of virtual servers that a node makes of it.

`VIPD_UPDATE_CASES=1 pytest tests/cases` fills in every ``table: TODO`` and ``network: TODO`` with
what is so now, to be read before it is believed.
"""

import os
from pathlib import Path

import pytest
from msgspec import Struct, convert
from ryaml import loads  # type: ignore[attr-defined] # its stub forgets to say so
from tests.cases.notation import network_line, table_lines

from vipd.dns.settings import parse_listen
from vipd.proxy.decode import decode, head_of
from vipd.proxy.decode_endpoints import Endpoints
from vipd.proxy.events import Applied, Deleted, Event, Kind
from vipd.proxy.names import NamespacedName, parse_address, parse_network
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import DetectLocal, NodeSettings
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources.documents import documents, items
from vipd.proxy.virtualserver import Changes, Key, Table, VirtualServer

FOLDER = Path(__file__).parent / "resolve"
FILES = sorted(FOLDER.glob("*.yaml"))
UPDATE = bool(os.environ.get("VIPD_UPDATE_CASES"))


class Node(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Settings of the node, by the names of the configuration file."""

    name: str = "node-a"
    ips: list[str] = []
    detect_local: DetectLocal = DetectLocal.CLUSTER_CIDR
    pods: tuple[str, ...] = ("10.244.0.0/16", "fd00:244::/48")
    interface: str = ""
    masquerade_all: bool = False
    masquerade_bit: int = 14
    node_port_addresses: list[str] | None = None
    node_port_primary: bool = False
    external_ips: bool = True
    service_ranges: list[str] = []
    dns_listens: list[str] = []

    def settings(self) -> NodeSettings:
        """Return them as the product has them."""
        ranges = self.node_port_addresses
        return NodeSettings(
            node_name=self.name,
            node_ips=tuple(map(parse_address, self.ips)),
            detect_local=self.detect_local,
            cluster_cidrs=tuple(map(parse_network, self.pods)),
            local_interface=self.interface,
            masquerade_all=self.masquerade_all,
            masquerade_bit=self.masquerade_bit,
            node_port_addresses=None if ranges is None else tuple(map(parse_network, ranges)),
            node_port_primary=self.node_port_primary,
            serve_external_ips=self.external_ips,
            service_cidrs=tuple(map(parse_network, self.service_ranges)),
            dns_listens=frozenset(map(parse_listen, self.dns_listens)),
        )


class Step(Struct, forbid_unknown_fields=True):
    """What happens, and the table after it."""

    what: str
    table: str
    manifests: str = ""
    delete: list[str] = []
    network: str | None = None


class Case(Struct, forbid_unknown_fields=True):
    """A file."""

    description: str
    table: str
    manifests: str
    node: Node = Node()
    network: str | None = None
    steps: list[Step] = []


def read(path: Path) -> Case:
    """Return the case of a file."""
    return convert(loads(path.read_text()), Case)


def events(manifests: str, delete: list[str]) -> list[Event]:
    """Return the events of the manifests; deleted objects read ``Service default/web``."""
    found: list[Event] = []
    for text in delete:
        kind, _, name = text.partition(" ")
        space, _, rest = name.rpartition("/")
        found.append(Deleted(Kind(kind), NamespacedName(space, rest)))
    for document in documents(manifests.encode()):
        for item in items(document):
            thing = decode(item.raw, "case", head_of(item.raw, "case"))
            assert not isinstance(thing, Endpoints), "cases speak of slices"
            if thing is not None:
                found.append(Applied(thing))
    return found


def lines(text: str) -> list[str]:
    """Return the lines of a table."""
    return [] if text == "nothing" else text.splitlines()


def stages(case: Case) -> list[Step]:
    """Return the beginning and all steps alike."""
    first = Step("at the beginning", case.table, case.manifests, network=case.network)
    return [first, *case.steps]


def winners(table: Table) -> dict[Key, VirtualServer]:
    """Return who answers each key."""
    return {key: claims[0] for key, claims in table.claims.items()}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_case(path: Path) -> None:
    case = read(path)
    settings = case.node.settings()
    snapshot = Snapshot()
    table = resolve(snapshot, settings)
    for step in stages(case):
        before = table
        snapshot, touched = fold(snapshot, events(step.manifests, step.delete))
        table, changes = update(table, snapshot, settings, touched)
        if UPDATE:
            _rewrite(path, step, table)
            continue
        assert table_lines(table) == lines(step.table), step.what
        if step.network is not None:
            assert network_line(table.network) == step.network.strip(), step.what
        assert table == resolve(snapshot, settings), "from scratch it is the same"
        assert changes == _difference(before, table), step.what


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_order_in_which_objects_are_told_does_not_matter(path: Path) -> None:
    case = read(path)
    told = events(case.manifests, [])
    table = resolve(fold(Snapshot(), reversed(told))[0], case.node.settings())
    assert table_lines(table) == lines(case.table)


def test_descriptions_are_one_sentence() -> None:
    for path in FILES:
        assert read(path).description.strip().endswith("."), path.name
        assert "\n" not in read(path).description.strip(), path.name


def _difference(before: Table, after: Table) -> Changes:
    old, new = winners(before), winners(after)
    return Changes(
        {key: new.get(key) for key in {**old, **new} if old.get(key) != new.get(key)},
        after.network if after.network != before.network else None,
    )


def _rewrite(path: Path, step: Step, table: Table) -> None:
    """Put the tables as they are in place of the next ``table: TODO`` of the file."""
    text = path.read_text()
    for word, now in (("table", table_lines(table)), ("network", [network_line(table.network)])):
        place = text.find(f"{word}: TODO\n")
        if place < 0 or getattr(step, word) != "TODO":
            continue
        margin = " " * (place - text.rfind("\n", 0, place) - 1 + 2)
        body = "|\n" + "".join(f"{margin}{line}\n" for line in now) if now else "nothing\n"
        text = text.replace(f"{word}: TODO\n", f"{word}: {body}", 1)
    path.write_text(text)
