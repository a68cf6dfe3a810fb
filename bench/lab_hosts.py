"""One host of a running lab: its namespace, the mark that says whose it is, its processes.

Lives here: everything asked of or done to a single namespace. Must not: know other hosts, nor the
order in which a lab is built (lab.py).

The mark is the alias of the device lo inside the namespace: `vipd lab PREFIX building`, and the
digest of the topology instead of `building` once the host is complete. It appears together with
the name, goes with the namespace, and cannot be forged by a namespace of the same name.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from vipd.bench import lab_netns
from vipd.bench.lab_errors import LabError, LabUnavailable

BUILDING = "building"


def ip_tool() -> str:
    """Path of iproute2's `ip`; raise LabUnavailable. /usr/sbin is not on every user's PATH."""
    found = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin")
    if found is None:
        raise LabUnavailable("`ip` was not found: install iproute2 (apt install iproute2)")
    return found


def _run_ip(arguments: list[str], batch: str) -> str:
    """Run `ip` in the calling thread's namespace; raise LabError with what it said."""
    done = subprocess.run(
        [ip_tool(), *arguments], input=batch, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        line = _failed_line(batch, done.stderr)
        raise LabError(f"ip {' '.join(arguments)}: {line}{done.stderr.strip()}")
    return done.stdout


def _failed_line(batch: str, stderr: str) -> str:
    """The batch line that `Command failed -:N` speaks of, followed by a colon."""
    number = stderr.rpartition("Command failed -:")[2].strip()
    lines = batch.splitlines()
    return f"{lines[int(number) - 1]}: " if number.isdigit() and int(number) <= len(lines) else ""


def mark(prefix: str, state: str) -> str:
    """The alias of lo that makes a namespace one of the lab called `prefix`."""
    return f"vipd lab {prefix} {state}"


def create(path: Path, prefix: str, sysctls: Iterable[tuple[str, str]]) -> None:
    """Make a marked namespace with lo up. Raise LabError."""

    def prepare() -> None:
        _run_ip(["-batch", "-"], f"link set dev lo up alias '{mark(prefix, BUILDING)}'\n")
        for name, value in sysctls:
            Path("/proc/sys/net", name).write_text(value)

    try:
        lab_netns.create(path, prepare)
    except OSError as failure:
        raise LabError(f"namespace {path.name} cannot be made: {failure}") from failure


def apply(path: Path, batch: str) -> None:
    """Run `ip -batch` inside; raise LabError naming the line that failed."""
    lab_netns.inside(path, lambda: _run_ip(["-batch", "-"], batch))


def state(path: Path, prefix: str) -> str | None:
    """What the mark says: `building`, a digest, or None where the namespace is not this lab's."""
    answer = lab_netns.inside(path, lambda: _run_ip(["-json", "link", "show", "dev", "lo"], ""))
    alias = str(json.loads(answer)[0].get("ifalias", ""))
    start = mark(prefix, "")
    return alias.removeprefix(start) if alias.startswith(start) else None


def addresses(path: Path) -> Mapping[str, frozenset[str]]:
    """The global addresses inside, as text, by the device that has them and is up."""
    answer = lab_netns.inside(path, lambda: _run_ip(["-json", "address", "show", "up"], ""))
    return {
        str(device["ifname"]): frozenset(
            str(entry["local"]) for entry in device["addr_info"] if entry["scope"] == "global"
        )
        for device in json.loads(answer)
        if device
    }


def listens(path: Path, port: int) -> bool:
    """Whether some TCP socket inside listens on `port` for IPv4."""

    def read() -> bool:
        lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        fields = (line.split() for line in lines)
        return any(entry[1].endswith(f":{port:04X}") and entry[3] == "0A" for entry in fields)

    return lab_netns.inside(path, read)


def _namespace_of(process: int) -> tuple[int, int] | None:
    """The namespace of a process's main thread; None where it ended, a zombie's having none."""
    try:
        found = Path(f"/proc/{process}/ns/net").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def processes(namespaces: frozenset[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Process ids whose main thread is in one of the namespaces, and which one that is."""
    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit())
    placed = ((number, _namespace_of(number)) for number in numbers)
    return {number: place for number, place in placed if place in namespaces and place is not None}


def kill_processes(namespaces: frozenset[tuple[int, int]]) -> int:
    """Kill what runs in the namespaces, and what it starts meanwhile; return how many there were.

    Waits for each to end. Raise LabError where the caller itself is inside.
    """
    killed = 0
    while found := processes(namespaces):
        if os.getpid() in found:
            raise LabError("this command runs inside the lab: leave it first (exit)")
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                killed += _kill(process, namespaces)
    return killed


def _kill(process: int, namespaces: frozenset[tuple[int, int]]) -> int:
    """Kill one process and wait for its end; 0 where its id now belongs to a process elsewhere."""
    descriptor = os.pidfd_open(process)
    try:
        if _namespace_of(process) not in namespaces:
            return 0
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        select.select([descriptor], [], [])
        return 1
    finally:
        os.close(descriptor)
