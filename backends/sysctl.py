"""Kernel settings that a dataplane changes, with their old values recorded so that they come back.

Lives here: reading, writing and the record (a JSON file). Must not: know why a setting is wanted
beyond the reason it is given.

The record is written before a setting is changed, and an old value is recorded once only, so a
process that is killed in between loses nothing. Restoring leaves alone what somebody has changed
since.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

ROOT = Path("/proc/sys")
MOUNTED = Path("/host/proc/sys")
"""Where a container without privileges, whose own /proc/sys is read-only, finds the host's: its
folder net is mounted there (deploy/base/daemonset.yaml; Cilium's path)."""


def here() -> Path:
    """Return the folder that stands for /proc/sys: the host's where that is mounted."""
    return MOUNTED if (MOUNTED / "net").is_dir() else ROOT


class Setting(Struct, frozen=True):
    """A setting by its path below /proc/sys, its value and why; `keep` is never taken back."""

    path: str
    value: str
    why: str
    keep: bool = False

    def __str__(self) -> str:
        return f"{self.path.replace('/', '.')}={self.value}"


class _Changed(Struct):
    before: str
    after: str


class Sysctls:
    """Settings of this network namespace and the record of what they were.

    `root`: the folder that stands for /proc/sys; None: the host's where that is mounted.
    """

    def __init__(self, record: Path, root: Path | None = None) -> None:
        self._record = record
        self._root = root or here()

    def apply(self, wanted: Iterable[Setting]) -> dict[Setting, str]:
        """Write the settings that differ; return those that could not be written, with the reason.

        Raises nothing: whether a failure matters is the caller's to say.
        """
        failed: dict[Setting, str] = {}
        record = self._read()
        for one in wanted:
            try:
                now = self._get(one.path)
                if now == one.value:
                    continue
                if not one.keep and one.path not in record:
                    record[one.path] = _Changed(now, one.value)
                    self._write(record)
                (self._root / one.path).write_text(one.value)
            except OSError as error:
                failed[one] = error.strerror or str(error)
        return failed

    def get(self, path: str) -> str:
        """Return the value of a setting, or an empty text where it cannot be read."""
        try:
            return self._get(path)
        except OSError:
            return ""

    def changed(self) -> list[str]:
        """Return what `restore` would do, one line for each setting."""
        return [
            f"{path.replace('/', '.')} back to {one.before}"
            for path, one in self._read().items()
            if self.get(path) == one.after and one.before != one.after
        ]

    def restore(self, allowed: Callable[[str], bool] = lambda path: True) -> list[str]:
        """Write the old values back where ours is still there; return what was done."""
        record = self._read()
        done, left = [], {}
        for path, one in record.items():
            if not allowed(path):
                left[path] = one
                continue
            if self.get(path) == one.after and one.before != one.after:
                with contextlib.suppress(OSError):
                    (self._root / path).write_text(one.before)
                    done.append(f"{path.replace('/', '.')} back to {one.before}")
        if left:
            self._write(left)
        else:
            with contextlib.suppress(OSError):
                self._record.unlink()
        return done

    def _get(self, path: str) -> str:
        return " ".join((self._root / path).read_text().split())

    def _read(self) -> dict[str, _Changed]:
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=dict[str, _Changed])
        except (OSError, msgspec.DecodeError):
            return {}

    def _write(self, record: dict[str, _Changed]) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        draft = self._record.with_name(f".{self._record.name}")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        os.replace(draft, self._record)
