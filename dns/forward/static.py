"""Names that the operator has given records here: hosts and single records.

Lives here: what is answered for them. Pure. Must not: read files (sources.py), or follow a CNAME to
somebody else's name (forwarder.py).

A name that has records has these and no others, whatever an upstream would say. Names below it are
none of its business.
"""

from collections.abc import Iterable
from typing import NamedTuple

from vipd.dns import names
from vipd.dns.forward import wire
from vipd.dns.forward.got import Got
from vipd.dns.forward.hosts import Host

_REFUSED_TYPES = frozenset({wire.SOA, wire.NS, wire.OPT, wire.DNAME, wire.RRSIG, wire.NSEC})
_MOST_BYTES = 64_000
"""Of the records of one name and type: a message has 65,535, with its question."""
_NOBODY = b"\x06nobody\x07invalid\0"
_LOCALHOST = b"\x09localhost\0"


class Record(NamedTuple):
    """One record. `name` and names in `rdata` are in wire form; `name` in lower case."""

    name: bytes
    type: int
    ttl: int
    rdata: bytes


def parse_record(text: str, ttl: int) -> Record:
    """Read ``NAME [TTL] [IN] TYPE DATA``; `ttl` is for those that have none. Raise ValueError."""
    # Not above: the daemon reads settings and has no other use for dnspython, which is 5 MB.
    import dns.exception
    import dns.name
    import dns.rdataclass
    import dns.rdatatype
    import dns.zonefile

    if "\n" in text or "\r" in text:
        raise ValueError(f"{text!r} is more than one line")
    try:
        found = dns.zonefile.read_rrsets(
            text, origin=dns.name.root, relativize=False, default_ttl=ttl, rdclass=None
        )
    except (dns.exception.DNSException, ValueError) as error:
        raise ValueError(f"{text!r} is no record: {error}") from None
    if len(found) != 1 or len(found[0]) != 1:
        raise ValueError(f"{text!r} is no record: NAME [TTL] TYPE DATA")
    (rrset,) = found
    if rrset.rdtype in _REFUSED_TYPES or 128 <= rrset.rdtype <= 255:
        kind = dns.rdatatype.to_text(rrset.rdtype)
        raise ValueError(f"{text!r}: records of type {kind} cannot be given here")
    if rrset.rdclass != dns.rdataclass.IN:
        raise ValueError(f"{text!r}: only class IN is answered")
    name = rrset.name.canonicalize().to_wire()
    rdata = rrset[0].to_wire(origin=dns.name.root)
    if name is None or rdata is None:  # only with a file to write to
        raise ValueError(f"{text!r} is no record")
    return Record(name, int(rrset.rdtype), int(rrset.ttl), rdata)


def records_of(hosts: Iterable[Host], ttl: int) -> list[Record]:
    """Return the address records of hosts, and one PTR record for each address: its first name."""
    made: dict[Record, None] = {}
    reverse: dict[bytes, Record] = {}
    for address, name in hosts:
        kind = wire.A if address.version == 4 else wire.AAAA
        made[Record(name, kind, ttl, address.packed)] = None
        back = names.reverse_name(address.packed)
        reverse.setdefault(back, Record(back, wire.PTR, ttl, name))
    return [*made, *reverse.values()]


def denial(name: bytes, qtype: int, rcode: int, zone: bytes, ttl: int) -> bytes:
    """Return a reply that says there is nothing, with a SOA record so that clients remember it.

    The SOA is that of RFC 6303, section 3, for zones that exist nowhere else.
    """
    numbers = b"".join(one.to_bytes(4, "big") for one in (1, 3600, 1200, 604_800, ttl))
    soa = wire.record(wire.SOA, ttl, _LOCALHOST + _NOBODY + numbers, owner=zone)
    return wire.reply(name, qtype, rcode, authority=(soa,))


class Static:
    """All names that have records here. Built at once, never changed."""

    def __init__(self, records: Iterable[Record] = (), ttl: int = 30) -> None:
        self._ttl = ttl
        self._names: dict[bytes, dict[int, list[bytes]]] = {}
        self._targets: dict[bytes, bytes] = {}
        self.left_out: list[str] = []
        """One sentence for each record that cannot stand beside the others."""
        for one in dict.fromkeys(records):
            self._add(one)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def names(self) -> frozenset[bytes]:
        """Return the names that have records."""
        return frozenset(self._names)

    def find(self, name: bytes, qtype: int) -> Got | None:
        """Return the reply for a lower-case name; None where it has no records here.

        Where `target` names it, the reply is its CNAME and no more.
        """
        there = self._names.get(name)
        if there is None:
            return None
        if wire.CNAME in there:
            qtype_found = wire.CNAME
        elif qtype == wire.ANY:  # RFC 8482, 4.1: any of them
            qtype_found = next(iter(there))
        else:
            qtype_found = qtype
        if qtype_found in there:
            return Got(wire.reply(name, qtype, answers=tuple(there[qtype_found])))
        return Got(denial(name, qtype, wire.NOERROR, name, self._ttl))

    def target(self, name: bytes, qtype: int) -> bytes | None:
        """Return the name that has to be asked instead; None where `find` says it all."""
        return None if qtype in (wire.CNAME, wire.ANY) else self._targets.get(name)

    def _add(self, one: Record) -> None:
        there = self._names.setdefault(one.name, {})
        if there and (wire.CNAME in there or one.type == wire.CNAME):
            said = "no other record can stand beside a CNAME"
            self.left_out.append(f"{names.text_of(one.name)}: {said}")
            return
        made = wire.record(one.type, one.ttl, one.rdata)
        held = there.setdefault(one.type, [])
        if len(made) * (len(held) + 1) > _MOST_BYTES:
            self.left_out.append(f"{names.text_of(one.name)}: more records than one reply can hold")
            return
        held.append(made)
        if one.type == wire.CNAME:
            self._targets[one.name] = one.rdata.lower()
