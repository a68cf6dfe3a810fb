"""Which file's form of an object holds, when several files describe the same one.

Lives here: the claims of all files and what follows from a change of one. Must not: read files, or
know what objects mean.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from msgspec import Struct

from vipd.proxy.decode import Decoded
from vipd.proxy.errors import ManifestError
from vipd.proxy.events import Problem
from vipd.proxy.sources.files import Key


class Change(Struct, frozen=True):
    """The object of this key is now so, or is gone (None)."""

    key: Key
    value: Decoded | None


class Claims:
    """The objects of all files. The file that had an object first keeps it until it lets go."""

    def __init__(self) -> None:
        self._files: dict[str, Mapping[Key, Decoded]] = {}
        self._leaving: dict[str, AbstractSet[Key]] = {}
        self._claimants: dict[Key, tuple[str, ...]] = {}
        self._published: dict[Key, Decoded] = {}
        self._rivals: dict[Key, tuple[str, ...]] = {}
        self._dirty: dict[Key, None] = {}

    def update(
        self, file: str, objects: Mapping[Key, Decoded], leaving: AbstractSet[Key] = frozenset()
    ) -> None:
        """A file now holds `objects`; those in `leaving` yield to any other file at once."""
        old, old_leaving = self._files.get(file, {}), self._leaving.pop(file, frozenset())
        for key, value in objects.items():
            if key not in old:
                self._claimants[key] = (*self._claimants.get(key, ()), file)
            elif old[key] is value and (key in leaving) == (key in old_leaving):
                continue
            self._dirty[key] = None
        for key in old:
            if key not in objects:
                self._claimants[key] = tuple(f for f in self._claimants[key] if f != file)
                self._dirty[key] = None
        self._files[file] = objects
        if leaving:
            self._leaving[file] = leaving
        if not objects:
            del self._files[file]

    def holding(self) -> list[Decoded]:
        """Return every object in the form that holds. May be asked from any thread."""
        return list(self._published.values())

    def settle(self) -> tuple[list[Change], list[Problem]]:
        """Return what changed since the last time, deletions first, and who stands back."""
        gone: list[Change] = []
        new: list[Change] = []
        problems: list[Problem] = []
        for key in self._dirty:
            files = self._claimants[key]
            staying = tuple(f for f in files if key not in self._leaving.get(f, ())) or files[:1]
            value = self._files[staying[0]][key] if staying else None
            if not files:
                del self._claimants[key]
            if value is None:
                if self._published.pop(key, None) is not None:
                    gone.append(Change(key, None))
            elif self._published.get(key) != value:
                new.append(Change(key, value))
                self._published[key] = value
            elif self._published[key] is not value:
                self._published[key] = value
            problems += self._stand_back(key, staying)
        self._dirty.clear()
        return gone + new, problems

    def _stand_back(self, key: Key, staying: tuple[str, ...]) -> list[Problem]:
        old, new = self._rivals.pop(key, ()), staying if len(staying) > 1 else ()
        if new:
            self._rivals[key] = new
        if old == new:
            return []
        problems = [Problem(f"{file} {key} twice", None) for file in old[1:] if file not in new[1:]]
        for file in new[1:]:
            why = f"is in {new[0]} as well, and that one is used"
            problems.append(Problem(f"{file} {key} twice", ManifestError(file, str(key), "", why)))
        return problems
