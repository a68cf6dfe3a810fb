"""Checks of single fields: names, addresses, ranges, and the sentence for what is wrong with one.

Lives here: what a value of the Kubernetes API may look like, one function for each sort of value.
Must not: know which object has which field (decode.py), read anything.
Source: k8s.io/apimachinery/pkg/util/validation and k8s.io/utils/net (ParseIPSloppy), v1.37.
"""

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

from vipd.proxy.names import Address, Network, parse_network

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?\Z")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\Z")
_LEADING_ZEROS = re.compile(r"\b0+(?=[0-9])")
_SHOWN = 60
"""Characters of a wrong value that a message repeats."""
_SPECIAL = "is an unspecified, loopback, multicast or broadcast address"
_BROADCAST = 0xFFFF_FFFF


class FieldError(Exception):
    """A field is wrong. `field` is its path in the object, `why` the rest of the sentence."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(field, why)
        self.field = field
        self.why = why


def shown(value: object) -> str:
    """Return a value as a message repeats it: quoted if text, cut when long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@lru_cache(maxsize=1 << 17)
def address(text: str) -> Address:
    """Return an address that traffic can be sent to; raise ValueError with the reason.

    Leading zeros are decimal and IPv4-mapped IPv6 is IPv4, as in Go. An unspecified, loopback or
    multicast address is refused, as the API server refuses it (ValidateNonSpecialIP): a rule or
    socket for 0.0.0.0 would catch every address of the node. So are all of 0.0.0.0/8 (RFC 1122
    §3.2.1.3) and the broadcast address, which would become local routes. The rest of 240.0.0.0/4
    is not: some clouds give it to pods.
    """
    if ":" not in text:
        return _ipv4(text)
    if "%" in text:
        raise ValueError(f"{shown(text)} has a zone, which no endpoint or service address has")
    try:
        found = IPv6Address(text)
    except ValueError as error:
        raise ValueError(f"{shown(text)} is not an IP address") from error
    if found.ipv4_mapped is not None:
        return _ipv4(str(found.ipv4_mapped))
    if found.is_unspecified or found.is_loopback or found.is_multicast:
        raise ValueError(f"{shown(text)} {_SPECIAL}")
    return found


def _ipv4(text: str) -> IPv4Address:
    """Return the address as :func:`address` does; twice as fast as IPv4Address(str)."""
    parts = text.split(".")
    if len(parts) != 4 or not text.isascii():
        raise ValueError(f"{shown(text)} is not an IP address")
    number = 0
    for part in parts:
        octet = int(part) if part.isdigit() and len(part) < 10 else 256
        if octet > 255:
            raise ValueError(f"{shown(text)} is not an IP address")
        number = number << 8 | octet
    first = number >> 24
    if first in (0, 127) or 224 <= first < 240 or number == _BROADCAST:
        raise ValueError(f"{shown(text)} {_SPECIAL}")
    return IPv4Address(number)


def network(text: str, field: str) -> Network:
    """Return the network of a CIDR, leading zeros and outer white space allowed."""
    try:
        if "/" not in text:
            raise ValueError("no prefix length")  # noqa: TRY301 - one sentence for all reasons
        if ":" not in text:
            text = _LEADING_ZEROS.sub("", text)
        return parse_network(text)
    except ValueError as error:
        raise FieldError(field, f"{shown(text)} is not a CIDR such as 10.0.0.0/8") from error


@lru_cache(maxsize=1 << 14)
def is_name(text: str) -> bool:
    """Whether `text` can be an object's name: letters, digits, ``-``, ``.``, ``_``; at most 253.

    A little wider than DNS-1123, and narrow enough that a name can stand in any rule or comment.
    """
    return _NAME.match(text) is not None


@lru_cache(maxsize=1 << 10)
def is_label(text: str) -> bool:
    """Whether `text` can be one DNS label or a port's name: no dots, at most 63 characters."""
    return _LABEL.match(text) is not None


def checked_name(text: str | None, field: str) -> str:
    """Return an object's name or raise FieldError."""
    if not text:
        raise FieldError(field, "is missing")
    if not is_name(text):
        raise FieldError(
            field, f"{shown(text)} is not a name (letters, digits, '-' and '.', at most 253)"
        )
    return text


def checked_label(text: str | None, field: str) -> str:
    """Return a port's name or a hostname, empty if absent, or raise FieldError."""
    if not text:
        return ""
    if not is_label(text):
        raise FieldError(
            field, f"{shown(text)} is not a DNS label (letters, digits and '-', at most 63)"
        )
    return text
