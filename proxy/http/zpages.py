"""/statusz and /flagz: what a person reads of a component, as text.

Lives here: their text. Pure. Must not: know the daemon.
Source: staging/src/k8s.io/component-base/zpages of Kubernetes v1.36 (KEP-4827, KEP-4828).
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from msgspec import Struct, structs, to_builtins

from vipd.proxy.status import Status

_WARNING = (
    "Warning: This endpoint is not meant to be machine parseable, has no formatting "
    "compatibility guarantees and is for debugging purposes only."
)
LONGEST_LIST = 50
"""Sentences of one field that are told."""


def statusz(status: Status, now: float, runtime: str) -> str:
    """Return how the daemon is; `now` in seconds since the epoch, `runtime` Python's version."""
    up = max(0, int(now - status.started))
    started = datetime.fromtimestamp(status.started, UTC)
    lines = [
        "",
        "vipd statusz",
        _WARNING,
        "",
        f"Started: {started:%a %b %e %H:%M:%S UTC %Y}",
        f"Up: {up // 3600} hr {up // 60 % 60:02} min {up % 60:02} sec",
        f"Python version: {runtime}",
        f"Binary version: {status.version}",
        "",
        *_lines("", to_builtins(status)),
    ]
    return "\n".join(lines) + "\n"


def flagz(flags: Struct) -> str:
    """Return the flags that were given, one a line."""
    lines = ["", "vipd flags", _WARNING, ""]
    for name, value in sorted(structs.asdict(flags).items()):
        if value in (None, (), ""):
            continue  # not said
        told = ",".join(map(str, value)) if isinstance(value, tuple) else value
        lines.append(f"{name.replace('_', '-')}={told}")
    return "\n".join(lines) + "\n"


def _lines(name: str, value: object) -> Iterator[str]:
    """Yield what is known, a line each; what is empty is left out."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _lines(f"{name}.{key}" if name else str(key), one)
    elif isinstance(value, list | tuple):
        for one in value[:LONGEST_LIST]:
            yield from _lines(name, one)
        if len(value) > LONGEST_LIST:
            yield f"{name}: … and {len(value) - LONGEST_LIST} more"
    elif value not in (None, ""):
        yield f"{name}: {_printable(str(value))}"


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text)
