"""The record of the mode in use, which one daemon leaves for the next.

Lives here: writing it at once and whole, and reading it without trust. Must not: decide what
follows from it (switch.py). It lies beside the control socket, under /run: it ends with the boot.
"""

import contextlib
import os
import stat
from pathlib import Path

import msgspec
import structlog
from msgspec import structs

from vipd.backends.registry import MODES
from vipd.proxy.switch import Record, State

RECORD = "mode.json"
"""Name of the file beside the control socket."""

log = structlog.get_logger()


def write(path: Path, record: Record) -> None:
    """Replace the record. One that cannot be written is logged: nobody is served less for it."""
    draft = path.with_name(f".{path.name}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()  # left by a crash
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
            file.write(msgspec.json.encode(record))
        draft.replace(path)
    except OSError as error:
        log.warning("mode not recorded", path=str(path), why=error.strerror)


def read(path: Path) -> Record | None:
    """Return what the last daemon left, or None where there is nothing that can be trusted.

    A file of another user, or about modes that this version does not have, is nothing.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            told = os.fstat(file.fileno())
            if told.st_uid != os.geteuid() or not stat.S_ISREG(told.st_mode):
                log.warning("record of the mode is not ours", path=str(path), owner=told.st_uid)
                return None
            record = msgspec.json.decode(file.read(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("record of the mode not read", path=str(path), why=str(error))
        return None
    return _known(record, path)


def _known(record: Record, path: Path) -> Record | None:
    if record.state.serving not in MODES:
        log.warning("record of an unknown mode", path=str(path), mode=record.state.serving)
        return None
    state: State = record.state
    resumed = state.resumed if state.resumed and state.resumed.mode in MODES else None
    drains = tuple(one for one in state.drains if one.mode in MODES)
    return structs.replace(record, state=structs.replace(state, resumed=resumed, drains=drains))
