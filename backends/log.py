"""The log of a worker: an event and its facts, one line each on standard error, as the daemon's.

Lives here: how a line is written. Must not: be used by the daemon, whose log is structlog's
(proxy/logs.py).

Not structlog: that imports rich where it is installed, which takes 7 MB of every worker. And a
worker outlives whoever reads its standard error: a line that nobody takes is dropped, where it
would end the worker or stop it for ever.
"""

import os
import select
import traceback
from datetime import UTC, datetime

import msgspec

_STDERR = 2
_LONGEST_TRACEBACK = 3000
"""Characters, from the end; with it, a line fits into what a pipe takes at once."""

AT_ONCE = select.PIPE_BUF
"""Bytes that a pipe takes whole or not at all (pipe(7))."""

_as_json = False
_whose: dict[str, object] = {}


def configure(form: str, worker: int | None = None) -> None:
    """Write lines of this form from now on: ``text`` (logfmt) or ``json``; all name the worker."""
    global _as_json, _whose
    _as_json = form == "json"
    _whose = {} if worker is None else {"worker": worker}


def warning(event: str, **facts: object) -> None:
    """Log what an operator may have to know."""
    write(line("warning", event, facts))


def exception(event: str, **facts: object) -> None:
    """Log an error of this program, in an except clause."""
    told = traceback.format_exc().rstrip()[-_LONGEST_TRACEBACK:]
    write(line("error", event, {**facts, "exception": told}))


def line(level: str, event: str, facts: dict[str, object]) -> str:
    """Return a line without its end."""
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    whole = {"timestamp": now, "level": level, "event": event, **_whose, **facts}
    if _as_json:
        return msgspec.json.encode(whole, enc_hook=str).decode()
    return " ".join(f"{name}={_spelled(value)}" for name, value in whole.items())


def is_json() -> bool:
    """Return whether lines are JSON."""
    return _as_json


def write(text: str) -> None:
    """Write a line, if somebody takes it."""
    write_bytes(text.encode()[: AT_ONCE - 1] + b"\n")


def write_bytes(lines: bytes) -> bool:
    """Write lines of at most AT_ONCE bytes; return whether somebody takes them."""
    try:
        poll = select.poll()
        poll.register(_STDERR, select.POLLOUT)
        if any(mask & select.POLLOUT for _, mask in poll.poll(0)):
            return os.write(_STDERR, lines[:AT_ONCE]) > 0
    except OSError:
        pass  # nobody reads
    return False


def _spelled(value: object) -> str:
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"' if any(one in text for one in ' ="') else text
