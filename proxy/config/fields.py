"""A file's fields by their dotted paths: what is said, of which type, and what nobody knows.

Lives here: from an object of a file to what it says, from sayings to a Struct, and how fields are
spelled. Pure. Must not: know any field, or which place wins.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct, structs

from vipd.proxy.errors import ConfigError

_ACRONYMS = {one.lower(): one for one in ("CIDR", "CIDRs", "ARP", "DSR", "IP", "IPs")}
S = TypeVar("S", bound=Struct)


class Said(NamedTuple):
    """A value, and the place that says it: file and field, or the flag."""

    value: object
    where: str


Sayings = Mapping[str, Said]
"""By path, such as ``ipvs.tcpTimeout``; a section that is there and empty stands for itself."""


def spelled(name: str) -> str:
    """Return how files spell a field: ``cluster_cidrs`` as ``clusterCIDRs``."""
    first, *rest = name.split("_")
    return first + "".join(_ACRONYMS.get(one, one.capitalize()) for one in rest)


class Read(NamedTuple):
    """What became of an object: values by path, paths that nobody knows, and what is wrong."""

    values: Mapping[str, object]
    unknown: tuple[str, ...]
    wrong: tuple[tuple[str, str], ...]
    """Path and reason."""


def read(raw: Mapping[str, object], shape: type[Struct]) -> Read:
    """Return what an object says, checked against the types of `shape`; null says nothing."""
    values: dict[str, object] = {}
    unknown: list[str] = []
    wrong: list[tuple[str, str]] = []
    _read(raw, shape, "", values, unknown, wrong)
    return Read(values, tuple(unknown), tuple(wrong))


def _read(
    raw: Mapping[str, object],
    shape: type[Struct],
    path: str,
    values: dict[str, object],
    unknown: list[str],
    wrong: list[tuple[str, str]],
) -> None:
    fields = {one.encode_name: one for one in structs.fields(shape)}
    for name, value in raw.items():
        here = f"{path}{name}"
        if name not in fields:
            unknown.append(here)
        elif value is not None:
            section = as_section(fields[name].type)
            if section is None:
                _read_value(value, fields[name].type, here, values, wrong)
            elif not isinstance(value, dict):
                wrong.append((here, f"Expected `object`, got `{_name_of(value)}`"))
            elif value:
                _read(value, section, f"{here}.", values, unknown, wrong)
            else:
                values[here] = value


def _read_value(
    value: object, kind: Any, path: str, values: dict[str, object], wrong: list[tuple[str, str]]
) -> None:
    try:
        values[path] = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        why, _, inside = str(error).rpartition(" - at `$")
        wrong.append((path + inside.rstrip("`") if why else path, why or str(error)))


def as_section(kind: Any) -> type[Struct] | None:
    """Return the type of a field as the Struct that it is, None where it is a value."""
    return kind if isinstance(kind, type) and issubclass(kind, Struct) else None


def paths(shape: type[Struct], path: str = "") -> Iterator[str]:
    """Yield every path of a shape that is no section."""
    for one in structs.fields(shape):
        section = as_section(one.type)
        if section is None:
            yield f"{path}{one.encode_name}"
        else:
            yield from paths(section, f"{path}{one.encode_name}.")


def built(shape: type[S], sayings: Sayings, wrong: list[ConfigError]) -> S:
    """Return the Struct that sayings make, with defaults for the rest.

    What is of the wrong type is added to `wrong`, and has its default.
    """
    return _built(shape, "", sayings, wrong)


def _built(shape: type[S], path: str, sayings: Sayings, wrong: list[ConfigError]) -> S:
    given: dict[str, object] = {}
    for one in structs.fields(shape):
        here = f"{path}{one.encode_name}"
        section = as_section(one.type)
        if section is not None:
            given[one.name] = _built(section, f"{here}.", sayings, wrong)
        elif here in sayings:
            said = sayings[here]
            try:
                given[one.name] = msgspec.convert(said.value, one.type)
            except msgspec.ValidationError as error:
                wrong.append(ConfigError(said.where, str(error)))
    return shape(**given)


def _name_of(value: object) -> str:
    names = {bool: "bool", int: "int", float: "float", str: "str", list: "array"}
    return names.get(type(value), type(value).__name__)
