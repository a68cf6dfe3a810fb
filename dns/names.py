"""Domain names: as text, as bytes on the wire, of addresses in reverse, of addresses in one label.

Lives here: spellings and their limits. Pure. Must not: know which names there are.
A wire name is uncompressed: each label behind its length, the root's empty label last
(RFC 1035 3.1). Lower-case letters make it a key (RFC 4343).
"""

from functools import lru_cache
from ipaddress import IPv6Address, ip_address

LONGEST_NAME = 255
LONGEST_LABEL = 63
IN_ADDR = b"\x07in-addr\x04arpa\x00"
IP6 = b"\x03ip6\x04arpa\x00"

_OCTETS = tuple(b"%c%d" % (len(str(value)), value) for value in range(256))
_OCTET_OF = {label[1:]: value for value, label in enumerate(_OCTETS)}
_NIBBLE_OF = {b"%x" % value: value for value in range(16)}
_DASHED = frozenset(b"0123456789abcdef-")


def wire(text: str) -> bytes:
    """Return the key of a name written with dots, with or without the last; raise ValueError."""
    labels = text.removesuffix(".").split(".") if text != "." else []
    found = b"".join([label_wire(label) for label in labels]) + b"\x00"
    if len(found) > LONGEST_NAME:
        raise ValueError(f"{text!r} is longer than a domain name can be, 253 characters")
    return found


def is_label(text: str) -> bool:
    """Return whether a name can be one label of a domain name."""
    if not 0 < len(text) <= LONGEST_LABEL:
        return False
    return text.isascii() and text.isprintable() and " " not in text and "." not in text


def label_wire(text: str) -> bytes:
    """Return a label behind its length, in lower case; raise ValueError."""
    if not is_label(text):
        raise ValueError(
            f"{text!r} is no label: 1 to 63 characters of ASCII, without blanks or dots"
        )
    return b"%c%b" % (len(text), text.lower().encode())


def text_of(name: bytes) -> str:
    """Return a wire name with dots, the last included; odd octets as in RFC 4343 2.1."""
    labels: list[str] = []
    at = 0
    while length := name[at]:
        label = name[at + 1 : at + 1 + length]
        labels.append("".join(map(_shown, label)))
        at += length + 1
    return ".".join([*labels, ""]) if labels else "."


def starts(name: bytes) -> list[int]:
    """Return where each label begins, the root's empty one left out."""
    found: list[int] = []
    at = 0
    while length := name[at]:
        found.append(at)
        at += length + 1
    return found


def starts_if_good(name: bytes) -> list[int] | None:
    """Return the same of bytes that may be no name; None where they are none."""
    found: list[int] = []
    at, last = 0, len(name) - 1
    while at < last:
        found.append(at)
        length = name[at]
        if not 0 < length <= LONGEST_LABEL:
            return None
        at += length + 1
    return found if at == last < LONGEST_NAME and not name[at] else None


def reverse_name(packed: bytes) -> bytes:
    """Return the key under which an address is looked up in reverse (RFC 1035 3.5, RFC 3596)."""
    if len(packed) == 4:
        a, b, c, d = packed
        return b"".join((_OCTETS[d], _OCTETS[c], _OCTETS[b], _OCTETS[a], IN_ADDR))
    name = bytearray(b"\x01" * 64)
    name[1::2] = packed.hex().encode()[::-1]
    return bytes(name) + IP6


def reverse_part(label: bytes, *, octet: bool) -> int | None:
    """Return the number that a label of a reverse name is, None if it is not spelled as one."""
    return _OCTET_OF.get(label) if octet else _NIBBLE_OF.get(label)


def dashed(packed: bytes) -> bytes:
    """Return an address as one label: 10-0-0-1, or fd00--1. It neither begins nor ends with '-'."""
    return b"%d-%d-%d-%d" % tuple(packed) if len(packed) == 4 else _dashed6(packed)


@lru_cache(maxsize=1 << 13)
def _dashed6(packed: bytes) -> bytes:
    # Cached: it takes a few microseconds, and an SRV answer needs it of every endpoint.
    text = str(IPv6Address(packed)).replace(":", "-")
    return ("0" * text.startswith("-") + text + "0" * text.endswith("-")).encode()


def address_in(label: bytes) -> bytes | None:
    """Return the packed address that a label spells with dashes, in any form; None if it is none.

    An IPv4 address has exactly three dashes, and no IPv6 address with three is a valid IPv4 one.
    """
    if not _DASHED.issuperset(label):
        return None
    text = label.decode()
    for spelled in (text.replace("-", "."), text.replace("-", ":")):
        try:
            return ip_address(spelled).packed
        except ValueError:
            continue
    return None


def _shown(octet: int) -> str:
    if octet in b'."\\;@$()':
        return f"\\{octet:c}"
    return f"{octet:c}" if 0x21 <= octet <= 0x7E else f"\\{octet:03}"
