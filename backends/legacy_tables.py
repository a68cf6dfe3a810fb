"""A table of the legacy iptables as the kernel has it: whether it changed, and its chains.

Lives here: the two socket options that tell. Must not: know which chains are whose. ip_tables sends
no notifications. It tells the number of rules and the size of a table at once, and the table itself
in one copy, where `iptables-save` works for a second at 63,000 rules.
Source: include/uapi/linux/netfilter_ipv4/ip_tables.h (ip6_tables.h, x_tables.h), Linux 6.1.
"""

import ctypes
import os
import socket
import struct
from typing import NamedTuple

from vipd.proxy.names import Family

Info = bytes
"""Where each built-in chain begins and ends, how many rules there are, and their size."""
BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
"""In the order of enum nf_inet_hooks."""
_GET_INFO, _GET_ENTRIES = 64, 65
_INFO = struct.Struct("=32sI5I5III")
_HEAD = 40
"""Before the entries: the table's name, their size, and four bytes to align."""
_STANDARD, _ERROR = b"", b"ERROR"
_ERROR_SIZE = 64
_NAME_AT, _SAID_AT = 2, 32
"""In a target: its name; then what it says: a verdict, or the name of a chain that begins."""


class _Layout(NamedTuple):
    """What differs between the families."""

    family: int
    level: int
    offsets_at: int
    """Where an entry has target_offset and next_offset."""


_LAYOUTS = {
    Family.IPV4: _Layout(socket.AF_INET, socket.IPPROTO_IP, 88),
    Family.IPV6: _Layout(socket.AF_INET6, socket.IPPROTO_IPV6, 140),
}


class Shape(NamedTuple):
    """How many rules each own chain has, and where built-in chains jump to: (chain, target)."""

    rules: dict[str, int]
    jumps: frozenset[tuple[str, str]]


def info(family: Family, table: str) -> Info:
    """Return what changes where a rule comes or goes, anywhere in the table. Raise OSError."""
    return _asked(family, _GET_INFO, table, b"", _INFO.size)


def shape(family: Family, table: str, prefix: str) -> Shape:
    """Return the chains whose names begin with `prefix`, and the jumps to them. Raise OSError.

    Takes about half a microsecond for each rule of the table.
    """
    told = _INFO.unpack(info(family, table))
    size = told[13]
    entries = _asked(family, _GET_ENTRIES, table, struct.pack("=I", size), _HEAD + size)[_HEAD:]
    return _shape(_LAYOUTS[family].offsets_at, entries, told[1:12], prefix.encode())


def _shape(offsets_at: int, entries: bytes, hooks: tuple[int, ...], prefix: bytes) -> Shape:
    rules: dict[str, int] = {}
    begins: dict[int, str] = {}
    found: list[tuple[int, int]] = []
    current, count = "", 0
    last_built_in = max(hooks[6 + place] for place in range(5) if hooks[0] >> place & 1)
    unpack = struct.Struct("=HH").unpack_from
    at = 0
    while at < len(entries):
        target_at, step = unpack(entries, at + offsets_at)
        target = at + target_at
        (target_size,) = struct.unpack_from("=H", entries, target)
        if target_size == _ERROR_SIZE and _name(entries, target + _NAME_AT) == _ERROR:
            if current:
                rules[current] = count - 1  # without the RETURN at its end
            name = _name(entries, target + _SAID_AT)
            current = name.decode(errors="replace") if name.startswith(prefix) else ""
            if current:
                begins[at + step] = current
            count = 0
        else:
            count += 1
            if at <= last_built_in and _name(entries, target + _NAME_AT) == _STANDARD:
                found.append((at, struct.unpack_from("=i", entries, target + _SAID_AT)[0]))
        at += step
    jumps = {
        (BUILT_IN[place], begins[to])
        for place in range(5)
        if hooks[0] >> place & 1
        for at, to in found
        if hooks[1 + place] <= at <= hooks[6 + place] and to in begins
    }
    return Shape(rules, frozenset(jumps))


def _name(entries: bytes, at: int) -> bytes:
    return entries[at : entries.index(b"\0", at)]


_C = ctypes.CDLL(None, use_errno=True)


def _asked(family: Family, option: int, table: str, said: bytes, size: int) -> bytes:
    """Return what a socket option tells; Python's own getsockopt hands nothing in."""
    layout = _LAYOUTS[family]
    buffer = ctypes.create_string_buffer(table.encode().ljust(32, b"\0") + said, size)
    length = ctypes.c_uint(size)
    with socket.socket(layout.family, socket.SOCK_RAW, socket.IPPROTO_RAW) as asking:
        code = _C.getsockopt(asking.fileno(), layout.level, option, buffer, ctypes.byref(length))
    if code:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw
