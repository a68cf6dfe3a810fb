"""The records that every zone has at its top, and the SOA that negative answers carry.

Lives here: SOA, NS, and the fixed names under a cluster domain (dns-version, ns.dns). Pure.
Must not: know services. Where the SOA goes into a message its names are compressed: it stands in
half of all replies.
"""

from vipd.dns.names import label_wire
from vipd.dns.records import EMPTY, Node, Owned, RRset, Type, address_sets, character_string, soa

SCHEMA_VERSION = "1.1.0"
VERSION_TTL = 28800
MOST_SOA_TTL = 300
"""Seconds; CoreDNS' bound."""

_SERVER, _CONTACT = b"\x02ns\x03dns", b"\x0ahostmaster"
SVC = label_wire("svc")
VERSION = label_wire("dns-version")
DNS = label_wire("dns")
NS = label_wire("ns")


class Apex:
    """The top of a cluster domain, or of all reverse zones (then `domain` has their name server).

    `negative` makes, joined by a pointer to the zone's name, the SOA record of a negative answer.
    """

    __slots__ = (
        "_addresses",
        "_negative_ttl",
        "_reverse",
        "domain",
        "negative",
        "services",
        "soa",
        "ttl",
    )

    def __init__(
        self,
        domain: bytes,
        ttl: int,
        negative_ttl: int,
        addresses: tuple[bytes, ...],
        *,
        reverse: bool = False,
    ) -> None:
        self.domain, self.ttl = domain, ttl
        self.services = SVC + domain
        """What names of services end in."""
        self._negative_ttl, self._addresses, self._reverse = negative_ttl, addresses, reverse
        self.negative: tuple[bytes, ...] = ()
        self.soa = EMPTY

    def renew(self, serial: int) -> None:
        """Make the SOA anew."""
        ttl = min(self._negative_ttl, MOST_SOA_TTL)
        server, contact = _SERVER + self.domain, _CONTACT + self.domain
        whole = soa(server, contact, serial, self._negative_ttl)
        self.soa = Node(RRset(Type.SOA, ttl, (whole,)))
        numbers = whole[-20:]
        head = Type.SOA.to_bytes(2) + b"\x00\x01" + ttl.to_bytes(4)
        if self._reverse:
            self.negative = (b"", head + len(whole).to_bytes(2) + whole)
            return
        length = len(_SERVER) + 2 + len(_CONTACT) + 2 + len(numbers)
        self.negative = (b"", head + length.to_bytes(2) + _SERVER, _CONTACT, numbers)

    def own(self, kind: int) -> Node:
        """Return what stands at the zone's own name."""
        if kind == Type.SOA:
            return self.soa
        if kind == Type.NS:
            server = _SERVER + self.domain
            glue = [Owned(server, one) for one in address_sets(self._addresses, self.ttl)]
            return Node(RRset(Type.NS, self.ttl, (server,)), tuple(glue))
        return EMPTY

    def fixed(self, below: list[bytes], kind: int) -> Node | None:
        """Return what stands at a name under a cluster domain that no object makes.

        `below` are the labels behind their lengths, the nearest to the domain first.
        """
        if below == [VERSION]:
            if kind == Type.TXT:
                return Node(RRset(kind, VERSION_TTL, (character_string(SCHEMA_VERSION),)))
            return EMPTY
        if below == [DNS]:
            return EMPTY
        if below == [DNS, NS]:
            return self._server(kind)
        return None

    def _server(self, kind: int) -> Node:
        sets = address_sets(self._addresses, self.ttl)
        return next((Node(one) for one in sets if one.type == kind), EMPTY)
