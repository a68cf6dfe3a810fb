"""Mending: what the kernel has otherwise than a program is put right, without nft reading it all.

Lives here: the comparison over netlink, and the elements sent the same way; tables, sets and rules
are still nft's to write. Must not: be used where the program may be wrong (an observation, and
plan.py, are for that). All but `mend` blocks.
"""

import asyncio
from collections.abc import Iterable, Mapping

from msgspec import Struct

from vipd.backends import netlink
from vipd.backends.netlink import ADDRESS_FAMILY
from vipd.backends.nftables import compile as compiling
from vipd.backends.nftables import raw, tables
from vipd.backends.nftables.chain_notes import ChainNotes, Place
from vipd.backends.nftables.compile import Program
from vipd.backends.nftables.objects import (
    FAMILY_WORD,
    SKELETON,
    TABLE,
    Chain,
    Container,
    Element,
    declare,
)
from vipd.backends.nftables.pipeline import chains, containers, shape_chain, skeleton
from vipd.backends.nftables.raw import DEL_ELEMENT, NEW_ELEMENT, Held
from vipd.backends.nftables.tool import Nft
from vipd.proxy.errors import OutOfStep
from vipd.proxy.names import Family
from vipd.proxy.words import counted

_VERDICTS_LAST = ("admitted", "services", "node-ports")
"""What leads packets to the other elements."""


_TOLD_LINES = ("add chain", "add table", "delete chain")
"""Commands that are told as what differs; the others go with them."""


class Work(Struct, frozen=True):
    """What has to be done: nft's part first, then transactions of elements."""

    lines: tuple[str, ...] = ()
    messages: tuple[bytes, ...] = ()
    size: int = 0
    """Kernel objects that are added or removed."""
    chains: tuple[Place, ...] = ()
    """Chains that nft's part writes."""
    what: tuple[str, ...] = ()
    """What differs, in words."""


async def mend(nft: Nft, program: Program, notes: ChainNotes, *, is_suspect: bool) -> int:
    """Make the kernel hold exactly `program`; return how many objects that took.

    See `ChainNotes.repair` for what is written again where it `is_suspect`.

    Raise DataplaneError, OutOfStep where the table is not as we ever made it: observe it then.
    """
    work = await asyncio.to_thread(difference, program, notes, is_suspect=is_suspect)
    if work.lines:
        await nft.run(["-f", "-"], "".join(f"{line}\n" for line in work.lines))
        notes.put_right(work.chains)
    if work.messages:
        await asyncio.to_thread(_send, work.messages)
    return work.size


def difference(program: Program, notes: ChainNotes, *, is_suspect: bool = False) -> Work:
    """Return what the kernel has otherwise than the program. Raise DataplaneError."""
    wanted = wanted_elements(program)
    there = tables.listed()
    lines: list[str] = []
    written: list[Place] = []
    messages: list[bytes] = []
    size = 0
    what: list[str] = []
    for family in Family:
        word = FAMILY_WORD[family]
        lost = notes.repair(family, SKELETON, [skeleton()], is_suspect=is_suspect)
        if lost.lines:
            lines += [f"add table {word} {SKELETON}", *lost.lines]
            written += lost.written
            size += 1
            what.append(f"table {word} {SKELETON}")
        is_new = (word, TABLE) not in there
        if is_new:
            what.append(f"table {word} {TABLE}")
            lines.append(f"add table {word} {TABLE}")
        own = _own(family, program)
        made = _declarations(family, {one.name: one for one in (*containers(family), *own.maps)})
        wrong = notes.repair(
            family, TABLE, _wanted_chains(family, program, own.chains), is_suspect=is_suspect
        )
        made += wrong.lines
        written += wrong.written
        lines += made
        size += len(made)
        what += [one for one in made if one.startswith(_TOLD_LINES)]
        for container in sorted(containers(family), key=lambda one: one.name in _VERDICTS_LAST):
            told, count = _elements(
                family, container, wanted[family, container.name], is_new=is_new
            )
            messages += told
            size += count
            if count:
                what.append(f"{counted(count, 'element')} of {word} {TABLE} {container.name}")
    return Work(tuple(lines), tuple(messages), size, tuple(written), tuple(what))


def wanted_elements(program: Program) -> dict[tuple[Family, str], Held]:
    """Return every element that the kernel has to hold, by family and container."""
    layouts = {(of, one.name): raw.layout(one) for of in Family for one in containers(of)}
    wanted: dict[tuple[Family, str], Held] = {place: {} for place in layouts}

    def add(family: Family, element: Element) -> None:
        place = (family, element.container)
        key, value = raw.encoded(layouts[place], element)
        wanted[place][key] = value

    for key, one in program.entries.items():
        server = one.virtual_server
        if server.affinity_seconds is None:
            into = wanted[key.family, f"{compiling.prefix_of(server)}endpoints"]
            into.update(raw.targets(key, compiling.numbered(one)))
        for element in compiling.other_elements(one):
            add(key.family, element)
        for item in compiling.shared(one):
            if item.container not in ("chain", "map"):
                add(key.family, Element(item.container, item.key, ""))
    return wanted


class _Own(Struct, frozen=True):
    chains: tuple[Chain, ...]
    maps: tuple[Container, ...]


def _own(family: Family, program: Program) -> _Own:
    """Return the chains and maps of single service ports."""
    made = [
        compiling.own_objects(one)
        for key, one in program.entries.items()
        if key.family is family and compiling.has_own_chains(one.virtual_server)
    ]
    held = {one.name: one for each in made for one in each.chains}
    maps = {one.name: one for each in made for one in each.maps}
    return _Own(tuple(held.values()), tuple(maps.values()))


def _declarations(family: Family, wanted: Mapping[str, Container]) -> list[str]:
    """Return the commands for containers that are missing."""
    seen = tables.comments_of_sets(FAMILY_WORD[family], TABLE)
    for name, one in wanted.items():
        if seen.get(name, one.comment) != one.comment:
            raise OutOfStep(f"{name} of {family} is another one than ours")
    return [declare(family, one) for name, one in wanted.items() if name not in seen]


def _wanted_chains(family: Family, program: Program, own: Iterable[Chain]) -> list[Chain]:
    """Return every chain that the table should have: the constant ones, shapes, and own ones."""
    shapes = [shape_chain(name, family) for of, name in sorted(program.shapes) if of == family]
    return [*chains(family, program.network), *shapes, *own]


def _elements(
    family: Family, container: Container, missing: Held, *, is_new: bool
) -> tuple[list[bytes], int]:
    """Return the messages that make a container hold what it should, and how many elements.

    `missing` is everything it should hold; what is there already is taken from it.
    """
    number, name = ADDRESS_FAMILY[family], container.name
    of = raw.layout(container)
    stray: Held = {}
    if not is_new:
        stray = tables.elements(number, TABLE, name)
        same = missing.items() & stray.items()
        for key, _ in same:
            del missing[key], stray[key]
    messages = [
        *raw.changes(DEL_ELEMENT, number, TABLE, name, of, stray),
        *raw.changes(NEW_ELEMENT, number, TABLE, name, of, missing),
    ]
    return messages, len(stray) + len(missing)


def _send(messages: Iterable[bytes]) -> None:
    with netlink.netfilter() as socket:
        socket.transact(messages, raw.edge(16), raw.edge(17))
