"""A plan as a value: operations in order, by virtual server, and who needs what.

Lives here: the plan, its text, and what is left of it where virtual servers are rejected. Pure.
Must not: make plans (plan.py) or do them (driver.py).
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeVar

from msgspec import Struct

from vipd.backends.local_routes import Verb, Wanted, told
from vipd.backends.nftables.objects import elements_command
from vipd.backends.userspace import return_path
from vipd.backends.userspace.compile import is_shared
from vipd.backends.userspace.objects import (
    ROUTE_PROTOCOL,
    TABLE,
    Element,
    ReturnPath,
    Route,
    Surroundings,
    Thing,
    Value,
)
from vipd.proxy.virtualserver import Key

ErrorT = TypeVar("ErrorT")


class Operation(NamedTuple):
    """One thing that is added, changed or taken away; `value` is what it is then (or was)."""

    verb: Verb
    thing: Thing
    value: Value

    def __str__(self) -> str:
        thing, value = self.thing, self.value
        if isinstance(thing, Route):
            return told(Wanted(self.verb, thing.address, str(value)), ROUTE_PROTOCOL)
        if isinstance(thing, Element):
            verb = "delete" if self.verb == "del" else "add"
            return f"nft {elements_command(verb, thing.family, thing.set, [thing.text], TABLE)}"
        if isinstance(thing, ReturnPath):
            return return_path.told(self.verb, thing.family, str(value))
        words = {"add": "listen", "replace": "change", "del": "close"}
        return f"{words[self.verb]} {thing}" + ("" if self.verb == "del" else f": {value}")


class Unit(Struct, frozen=True):
    """What one virtual server changes; `key` is None for what belongs to none (stray things).

    `conflict` says why it cannot be done at all, or not as it should be.
    """

    key: Key | None
    now: tuple[Operation, ...] = ()
    later: tuple[Operation, ...] = ()
    conflict: str = ""

    def __bool__(self) -> bool:
        return bool(self.now or self.later or self.conflict)


class Needed(NamedTuple):
    """Something shared, and the virtual servers that need it."""

    value: Value
    keys: list[Key]


class UserspacePlan(Struct, frozen=True):
    """A plan for the driver. `prologue` are nft commands that make the fixed rules."""

    prologue: tuple[str, ...] = ()
    units: tuple[Unit, ...] = ()
    surroundings: Surroundings | None = None
    """What the workers are told of the node, where that changes."""
    needed: Mapping[Thing, Needed] = {}
    """The shared things that nobody but virtual servers of this plan needs."""
    withdrawn: Mapping[Key, str] = {}
    """What was said of virtual servers (see `Unit.conflict`) and is true no longer."""

    def __bool__(self) -> bool:
        there = self.prologue or self.units or self.withdrawn
        return bool(there or self.surroundings is not None)

    def due(self, rejected: Collection[Key] = ()) -> bool:
        """Return whether anything is to be done now; what waits for its connections is not.

        That the `rejected` cannot be done is known.
        """
        if self.prologue or self.surroundings is not None:
            return True
        return any(unit.now or (unit.conflict and unit.key not in rejected) for unit in self.units)

    def __str__(self) -> str:
        lines = [f"nft {line}" for line in self.prologue]
        if self.surroundings is not None:
            lines.append(f"tell workers: {self.surroundings}")
        for unit in self.units:
            if unit.conflict:
                lines.append(f"# {unit.key}: {unit.conflict}")
            lines += map(str, unit.now)
            lines += [f"{one} # when its connections have ended" for one in unit.later]
        return "".join(f"{line}\n" for line in lines)

    @property
    def size(self) -> int:
        """Return the number of operations, and of commands of the prologue."""
        return len(self.prologue) + sum(len(unit.now) + len(unit.later) for unit in self.units)

    def concerned(self, failed: Mapping[Thing, ErrorT]) -> dict[Key, ErrorT]:
        """Return the virtual servers that cannot be as planned where operations have failed."""
        found: dict[Key, ErrorT] = {}
        for unit in self.units:
            error = next((failed[one.thing] for one in unit.now if one.thing in failed), None)
            if error is not None and unit.key is not None:
                found[unit.key] = error
        for thing, error in failed.items():
            if thing in self.needed:
                found |= dict.fromkeys(self.needed[thing].keys, error)
        return found

    def unneeded(self, rejected: Collection[Key]) -> dict[Thing, Value]:
        """Return the shared things that nobody needs without the rejected virtual servers."""
        return {
            thing: one.value
            for thing, one in self.needed.items()
            if all(key in rejected for key in one.keys)
        }

    def standing(self, rejected: Collection[Key] = ()) -> list[Operation]:
        """Return what is to be done now, without the rejected virtual servers.

        What one of them would bring for others as well is brought.
        """
        unneeded = self.unneeded(rejected) if rejected else {}
        return [
            one
            for unit in self.units
            for one in unit.now
            if unit.key not in rejected or (is_shared(one.thing) and one.thing not in unneeded)
        ]
