"""A table of the legacy iptables as the kernel has it: whether it changed, and its chains.

Lives here: the two socket options that tell. Must not: know which chains are whose. ip_tables sends
no notifications. It tells the number of rules and the size of a table at once, and the table itself
in one copy, where `iptables-save` works for a second at 63,000 rules.
Source: include/uapi/linux/netfilter_ipv4/ip_tables.h (ip6_tables.h, x_tables.h), Linux 6.1.
"""

import ctypes
import os
import re
import socket
import struct
from collections.abc import Iterator
from itertools import pairwise
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
_CHAIN_SIZE = 64
_CHAIN = re.compile(re.escape(struct.pack("=H", _CHAIN_SIZE) + b"ERROR\0"))
"""The target with which a chain begins, and the table ends: its size and its name."""
_NAME_AT, _SAID_AT = 2, 32
"""In a target: its name, empty for a verdict; then the verdict, or the name of the chain."""
_OFFSETS, _VERDICT = struct.Struct("=HH"), struct.Struct("=i")


class _Layout(NamedTuple):
    """What differs between the families."""

    family: int
    level: int
    entry_size: int
    """Of an entry without matches, up to its target."""
    offsets_at: int
    """Where an entry has target_offset and next_offset."""


_LAYOUTS = {
    Family.IPV4: _Layout(socket.AF_INET, socket.IPPROTO_IP, 112, 88),
    Family.IPV6: _Layout(socket.AF_INET6, socket.IPPROTO_IPV6, 168, 140),
}


class Shape(NamedTuple):
    """How many rules each own chain has, and where built-in chains jump to: (chain, target)."""

    rules: dict[str, int]
    jumps: frozenset[tuple[str, str]]


Known = dict[str, tuple[int, int]]
"""Chains that were counted: their size in bytes and their rules."""


def info(family: Family, table: str) -> Info:
    """Return what changes where a rule comes or goes, anywhere in the table. Raise OSError."""
    return _asked(family, _GET_INFO, table, b"", _INFO.size)


def shape(family: Family, table: str, prefix: str, known: Known) -> Shape:
    """Return the chains whose names begin with `prefix`, and the jumps to them. Raise OSError.

    A chain that has the size it had in `known` is not counted again; what is counted goes in there.
    """
    told = _INFO.unpack(info(family, table))
    size = told[13]
    entries = _asked(family, _GET_ENTRIES, table, struct.pack("=I", size), _HEAD + size)[_HEAD:]
    layout = _LAYOUTS[family]
    begins: dict[int, str] = {}
    rules: dict[str, int] = {}
    heads = [one.start() - layout.entry_size for one in _CHAIN.finditer(entries)]
    for head, end in pairwise(heads):
        name = _name(entries, head + layout.entry_size + _SAID_AT).decode(errors="replace")
        if not name.startswith(prefix):
            continue
        start = head + layout.entry_size + _CHAIN_SIZE
        begins[start] = name
        counted = known.get(name)
        if counted is None or counted[0] != end - start:
            # Without the RETURN at its end.
            counted = known[name] = (
                end - start,
                len(list(_steps(layout, entries, start, end))) - 1,
            )
        rules[name] = counted[1]
    verdicts = list(_verdicts(layout, entries, heads[0] if heads else size))
    hooks, begin, last = told[1], told[2:7], told[7:12]
    jumps = {
        (BUILT_IN[place], begins[to])
        for place in range(5)
        if hooks >> place & 1
        for at, to in verdicts
        if begin[place] <= at <= last[place] and to in begins
    }
    return Shape(rules, frozenset(jumps))


def _steps(layout: _Layout, entries: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where each entry begins, and where its target does."""
    while start < end:
        target, step = _OFFSETS.unpack_from(entries, start + layout.offsets_at)
        yield start, start + target
        if step <= 0:
            return
        start += step


def _verdicts(layout: _Layout, entries: bytes, end: int) -> Iterator[tuple[int, int]]:
    """Yield each entry of the built-in chains that jumps, with where to."""
    for at, target in _steps(layout, entries, 0, end):
        if not _name(entries, target + _NAME_AT):
            yield at, _VERDICT.unpack_from(entries, target + _SAID_AT)[0]


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
