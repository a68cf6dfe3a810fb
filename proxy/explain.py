"""Why a connection goes where it goes: `vipd explain`, from the table of virtual servers.

Lives here: the record of an explanation and the pure function that makes it: which virtual server
answers, which endpoints may be chosen and how likely, what source they see. Must not: know a
dataplane (the path through it is handed in) or format for a terminal (cli/). What policies say is
policies.py's, why an endpoint is left out left_out.py's.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from enum import StrEnum

from msgspec import Struct

from vipd.backends.protocol import Packet, Step
from vipd.backends.slots import assign, maglev
from vipd.proxy.left_out import LeftOut, left_out
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Address, family_of
from vipd.proxy.policies import Choice, choice_of, denied, policies
from vipd.proxy.question import inside
from vipd.proxy.resolve import is_dns
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.views import place
from vipd.proxy.virtualserver import (
    Endpoint,
    Key,
    Kind,
    Refusal,
    Table,
    VirtualServer,
)


class Verdict(StrEnum):
    """What becomes of a new connection."""

    ENDPOINT = "endpoint"
    """It goes to one of the endpoints."""
    REJECT = "reject"
    DROP = "drop"
    PASS = "pass"
    """vipd does not touch it."""
    UNSERVED = "unserved"
    """A virtual server should answer, and this mode does not serve it: the path tells the rest."""


class Chance(Struct, frozen=True, omit_defaults=True):
    """An endpoint that a new connection may be given to."""

    endpoint: str
    """``address:port``, IPv6 in brackets."""
    slots: int
    of: int
    """It holds `slots` of so many slots, and each is as likely as any other."""
    pod: str | None = None
    node: str | None = None
    local: bool = False
    terminating: bool = False
    masqueraded: bool = False
    source: str = ""
    """The source address that it sees; empty where that is an address of this node."""
    why: str = ""
    """Why this endpoint's source differs from what `Explanation.masquerade` says."""

    @property
    def share(self) -> float:
        """Return the probability."""
        return self.slots / self.of


class Answering(Struct, frozen=True, omit_defaults=True):
    """The virtual server that answers."""

    service: str
    """``namespace/name``, with ``:port`` where the port has a name."""
    kind: str
    address: str
    """``address:port``, or ``*:port`` for a node port."""
    protocol: str
    losers: tuple[str, ...] = ()
    """Services that claim the address too, and lost."""


class Explanation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What becomes of the first packet of a connection, and why. Texts are sentences' parts."""

    mode: str
    source: str
    sender: str
    """Who the source is: a pod, a node, this node itself, …"""
    interface: str = ""
    destination: str
    protocol: str
    verdict: Verdict
    why: str
    """What the verdict means, and where it comes from."""
    rejected: str = ""
    """Why the mode serves the virtual server otherwise than it should."""
    server: Answering | None = None
    policy: tuple[str, ...] = ()
    masquerade: str = ""
    """Whether the endpoints see the source, and why; empty where none is reached."""
    endpoints: tuple[Chance, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    path: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    """What the mode does otherwise than all this says, because its dataplane cannot."""
    live: tuple[str, ...] = ()
    """What the kernel knows of it."""


def explain(
    snapshot: Snapshot,
    table: Table,
    settings: NodeSettings,
    packet: Packet,
    *,
    own: Collection[Address],
    mode: str = "",
    sender: str = "",
    path: Sequence[Step] = (),
    notes: Sequence[str] = (),
) -> Explanation:
    """Return what becomes of a packet by the table, and by the snapshot why others are left out.

    `own` are this node's addresses: what ends on the node itself is not masqueraded. `path` is the
    same packet's way through the dataplane, and must not contradict what is said here.
    """
    server = answering(table, packet)
    if server is None:
        verdict, why = _unanswered(table, packet, settings)
        return Explanation(
            mode=mode, source=str(packet.source), sender=sender, interface=packet.interface,
            destination=_destination(packet), protocol=packet.protocol.value, verdict=verdict,
            why=why, path=tuple(path), notes=tuple(notes),
        )  # fmt: skip
    choice = choice_of(server, packet, table.network)
    kept_out = denied(server, packet)
    used = () if kept_out else choice.endpoints
    verdict, why = _verdict(server, choice, kept_out)
    conflict = table.contested.get(server.key)
    return Explanation(
        mode=mode,
        source=str(packet.source),
        sender=sender,
        interface=packet.interface,
        destination=_destination(packet),
        protocol=packet.protocol.value,
        verdict=verdict,
        why=why,
        server=Answering(
            service=str(server.owner),
            kind=server.kind.value,
            address=place(server.key),
            protocol=server.key.protocol.value,
            losers=tuple(map(str, conflict.losers)) if conflict else (),
        ),
        policy=tuple(policies(server, packet, table.network)),
        masquerade=choice.because if used else "",
        endpoints=tuple(_chances(server, used, choice, packet, table, own)),
        left_out=left_out(snapshot, server, settings, used, choice.local_only, kept_out),
        path=tuple(path),
        notes=tuple(notes),
    )


def _destination(packet: Packet) -> str:
    return place(
        Key(family_of(packet.destination), packet.destination, packet.protocol, packet.port)
    )


def answering(table: Table, packet: Packet) -> VirtualServer | None:
    """Return the virtual server that answers the packet's destination, if one does."""
    family = family_of(packet.destination)
    claims = table.claims.get(Key(family, packet.destination, packet.protocol, packet.port))
    if not claims and _asks_node_ports(table, packet):
        claims = table.claims.get(Key(family, None, packet.protocol, packet.port))
    return claims[0] if claims else None


def _asks_node_ports(table: Table, packet: Packet) -> bool:
    if not packet.to_node or packet.destination.is_loopback:
        return False
    return inside(packet.destination, table.network.node_port_ranges)


def goes_to_dns(packet: Packet, settings: NodeSettings) -> bool:
    """Return whether vipd's DNS server on this node answers, past the dataplane."""
    return is_dns(packet.destination, packet.port, packet.protocol, settings.dns_listens)


def _unanswered(table: Table, packet: Packet, settings: NodeSettings) -> tuple[Verdict, str]:
    """Return what becomes of a packet that no virtual server answers."""
    destination, port = packet.destination, f"{packet.port}/{packet.protocol}"
    untouched = "passes untouched"
    if goes_to_dns(packet, settings):
        return Verdict.PASS, f"{untouched}, and untracked: vipd's DNS server on this node answers"
    if packet.to_node:
        why = f"{untouched}: {destination} is this node's own, and what listens there answers"
        if Key(family_of(destination), None, packet.protocol, packet.port) in table.claims:
            ranges = ", ".join(map(str, table.network.node_port_ranges)) or "none"
            why += f"; {port} is a node port, but node ports answer on {ranges} only"
            why += ", never on loopback" if destination.is_loopback else ""
        return Verdict.PASS, why
    there = [
        one
        for one in table.virtual_servers()
        if one.kind is Kind.CLUSTER and one.key.address == destination
    ]
    if there:
        ports = ", ".join(sorted({f"{one.key.port}/{one.key.protocol}" for one in there}))
        return Verdict.REJECT, (
            f"refused: {destination} is a cluster IP of {there[0].owner.service}, "
            f"which has no port {port} (it has {ports})"
        )
    if inside(destination, table.network.service_cidrs):
        return Verdict.DROP, f"dropped: {destination} is a service address that no service has"
    return Verdict.PASS, f"{untouched}: no virtual server answers {destination}:{port} here"


def _verdict(server: VirtualServer, choice: Choice, kept_out: str) -> tuple[Verdict, str]:
    if kept_out:
        return Verdict.DROP, f"dropped: {kept_out}"
    if choice.endpoints:
        count = len(choice.endpoints)
        return Verdict.ENDPOINT, (
            f"goes to one of {count} endpoints" if count > 1 else "goes to the one endpoint"
        )
    if server.when_empty is Refusal.DROP:
        return Verdict.DROP, "dropped: policy Local, and every endpoint is on another node"
    where = " on this node" if choice.local_only else ""
    return Verdict.REJECT, f"refused: there is no usable endpoint{where}"


def _chances(
    server: VirtualServer,
    used: tuple[Endpoint, ...],
    choice: Choice,
    packet: Packet,
    table: Table,
    own: Collection[Address],
) -> Iterator[Chance]:
    """Yield the endpoints that hold slots, in the table's order."""
    table_of_slots = maglev(used) if server.algorithm is Algorithm.MAGLEV else assign((), used)
    slots = Counter((one.address, one.port) for one in table_of_slots)
    for one in used:
        held = slots[one.address, one.port]
        if not held:
            continue
        itself = one.address == packet.source and _known_here(one, packet, table)
        masqueraded = (choice.masquerade or itself) and one.address not in own
        why = ""
        if masqueraded and not choice.masquerade:
            why = "it reaches itself (hairpin): the answer has to come back through this node"
        elif choice.masquerade and not masqueraded:
            why = "it is on this node's own address: nothing leaves the node"
        yield Chance(
            endpoint=str(one),
            slots=held,
            of=slots.total(),
            pod=one.pod,
            node=one.node,
            local=one.local,
            terminating=one.terminating,
            masqueraded=masqueraded,
            source="" if masqueraded else str(packet.source),
            why=why,
        )


def _known_here(endpoint: Endpoint, packet: Packet, table: Table) -> bool:
    """Return whether any service of the protocol knows that the endpoint runs on this node."""
    if endpoint.local:
        return True
    return any(
        one.local and (one.address, one.port) == (endpoint.address, endpoint.port)
        for server in table.virtual_servers()
        if server.key.protocol is packet.protocol
        for one in (*server.cluster, *server.local)
    )
