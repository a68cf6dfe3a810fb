"""The iptables tools: which there are, which is in use, how they are run, and what they say.

Lives here: runs of `iptables-save`, `iptables-restore --noflush` and `--version` in both variants
and families, the wait for the xtables lock, and the DataplaneError that a failure means. Must not:
know what a chain is for; the iptables and IPVS backends do.

The variants: *legacy* talks to ip_tables and holds /run/xtables.lock while it reads and writes a
whole table; *nft* talks to nf_tables, has no lock and writes what it is told. Rules of one are
invisible to the other's tools, and both apply.
"""

import fcntl
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from enum import StrEnum

from msgspec import Struct

from vipd.backends.tool_run import ended
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, Rejected, UnknownResult, Unsupported
from vipd.proxy.names import Family

INSTALL = "install Debian's package iptables (1.8.0 or newer)"
PREFIX = "VIPD-"
"""What the names of all our chains and sets begin with."""
PATIENCE_SECONDS = 300.0
"""How long one run may take before it is killed; 70,000 rules take about 1 s."""
KUBELET = (":KUBE-IPTABLES-HINT ", ":KUBE-KUBELET-CANARY ")
"""Chains that kubelet makes in mangle with the host's iptables, for those who come in a container
with another one (KEP-3178)."""
LOCK = "/run/xtables.lock"
LOCK_SECONDS = 5
"""How long one run waits for the xtables lock; kube-proxy's value."""
LOCK_RUNS = 12
"""Runs that wait for the lock before it is said to be busy: a minute in all."""
_RESOURCE_PROBLEM = 4
_TRANSIENT = (
    "xtables lock",
    "Device or resource busy",
    "Resource temporarily unavailable",
    "No buffer space",
    "Cannot allocate memory",
    "Memory allocation problem",
    "Too many open files",
    "Interrupted system call",
)
_INTRODUCTION = re.compile(r"^ip6?tables\S* v[\d.]+ \(\w+\):|^(?:Try|Perhaps) .*")
_LINE = re.compile(r"(?:^|[^\w])line:? (\d+)", re.MULTILINE)
_GONE = re.compile(rf"(?:Chain '|Set ){PREFIX}\S+ doe|target [`']{PREFIX}")
"""A chain or set of ours that the text relies on is not there."""
_MISSING = (
    (re.compile(r"[Cc]ouldn't load (match|target) [`']([\w-]+)'"), "extension {0} {1}"),
    (re.compile(r"unable to initialize table '(\w+)'"), "table {0}"),
    (re.compile(r"can't initialize ip6?tables table [`'](\w+)'"), "table {0}"),
    (re.compile(r"(Could not fetch rule set generation id)"), "nf_tables"),
)


class Variant(StrEnum):
    """One of the two programs that are called iptables."""

    LEGACY = "legacy"
    NFT = "nft"


class RejectedAt(Rejected):
    """A restore was refused. `line` is the line of the text at fault, from 1; 0: not known.

    Where the kernel refuses the table as a whole (legacy), it is the line of the COMMIT.
    """

    def __init__(self, operation: str, stderr: str, line: int) -> None:
        super().__init__(operation, stderr)
        self.line = line


class Tools(Struct, frozen=True):
    """What `find` found: the variants that are installed, and which one the host's rules are in."""

    present: tuple[Variant, ...]
    default: Variant
    """What `iptables` is here; in a container that need not be the host's."""
    in_use: Variant
    """The variant that kubelet uses; where that cannot be told, the one that holds the host's
    rules; the default where neither or both do."""
    leftovers: tuple[str, ...] = ()
    """Our chains in the other variant, as ``iptables-legacy nat VIPD-SERVICES``."""


class Xtables:
    """Runs the iptables tools in the network namespace of this process.

    `variant` is the one that `save` and `restore` use; None: the one in use, found at the first
    run. `inherited` are descriptors that each run holds too: the lock of instance.py.
    `find_program` finds a program by its name.
    """

    def __init__(
        self,
        variant: Variant | None = None,
        inherited: Sequence[int] = (),
        find_program: Callable[[str], str | None] | None = None,
    ) -> None:
        self.lock_waits = 0
        """How many times the xtables lock was held by another program when it was wanted."""
        self._variant = variant
        self._inherited = tuple(inherited)
        self._find_program = find_program or _which
        self._default: Variant | None = None

    async def find(self) -> Tools:
        """Return which tools there are and which variant is in use. Changes nothing.

        Raise Unsupported where there is none at all.
        """
        self._default = await self._host_variant()
        present = tuple(one for one in Variant if self._path(one, Family.IPV4, "-save"))
        if not present:
            raise Unsupported("iptables is not there", INSTALL)
        default = self._default if self._default in present else present[0]
        saved = {one: await self._saved(one) for one in present}
        with_rules = {one: _has_rules(texts) for one, texts in saved.items()}
        holding = [one for one in present if with_rules[one]]
        in_use = await self._kubelets(present) or (holding[0] if len(holding) == 1 else default)
        leftovers = tuple(
            f"{program(one, family)} {table} {chain}"
            for one in present
            if one is not in_use
            for (family, table), text in saved[one].items()
            for chain in _our_chains(text)
        )
        return Tools(present, default, in_use, leftovers)

    async def variant(self) -> Variant:
        """Return the variant that `save` and `restore` use."""
        if self._variant is None:
            self._variant = (await self.find()).in_use
        return self._variant

    async def save(
        self,
        family: Family,
        table: str,
        variant: Variant | None = None,
        *,
        counters: bool = False,
    ) -> str:
        """Return what `iptables-save -t` prints for a table; with `counters`, `-c` as well.

        A legacy table that nobody has loaded is empty text, and stays unloaded.
        """
        kind = variant or await self.variant()
        if kind is Variant.LEGACY and not loaded(family, table):
            return ""
        path = self._path(kind, family, "-save")
        if path is None:
            raise Unsupported(f"{program(kind, family)}-save is not there", INSTALL)
        printed, _ = await self._run([path, *(["-c"] if counters else []), "-t", table], "")
        return printed.decode(errors="replace")

    async def restore(
        self, family: Family, text: str, *, variant: Variant | None = None, test: bool = False
    ) -> None:
        """Feed `text` to `iptables-restore --noflush`: each table in it changes at once or not.

        Raise RejectedAt with the line at fault, Busy where the lock stays held, OutOfStep where a
        chain is not there. `test` only lets the tool read it, and changes nothing.
        """
        kind = variant or await self.variant()
        path = self._path(kind, family, "-restore")
        if path is None:
            raise Unsupported(f"{program(kind, family)}-restore is not there", INSTALL)
        arguments = [path, "--noflush", *(["--test"] if test else [])]
        if kind is Variant.LEGACY:
            # 1.8.9 does not say that it waited, and waits for ever unless it is told how long.
            arguments += ["-w", str(LOCK_SECONDS)]
            self.lock_waits += _lock_is_held()
        for left in reversed(range(LOCK_RUNS)):
            try:
                await self._run(arguments, text)
            except Busy as error:
                if "xtables lock" not in str(error) or not left:
                    raise
            else:
                return

    def has(self, family: Family, variant: Variant) -> bool:
        """Return whether a family has a variant's tools, and the kernel has the family."""
        if family is Family.IPV6 and not os.path.exists("/proc/net/if_inet6"):
            return False
        return self._path(variant, family, "-restore") is not None

    async def _kubelets(self, present: Sequence[Variant]) -> Variant | None:
        """Return the variant that has kubelet's chains, or None where neither or both have."""
        found = set()
        for one in present:
            saved = await self.save(Family.IPV4, "mangle", one)  # it makes them in each family
            if any(line.startswith(KUBELET) for line in saved.splitlines()):
                found.add(one)
        return found.pop() if len(found) == 1 else None

    async def _host_variant(self) -> Variant | None:
        """Return what the host's `iptables` says it is."""
        path = self._find_program("iptables")
        if path is None:
            return None
        try:
            printed, _ = await self._run([path, "--version"], "")
        except DataplaneError:
            return None
        return Variant.NFT if b"nf_tables" in printed else Variant.LEGACY

    async def _saved(self, variant: Variant) -> dict[tuple[Family, str], str]:
        return {
            (family, table): await self.save(family, table, variant)
            for family in Family
            if self._path(variant, family, "-save")
            for table in ("filter", "nat")
        }

    def _path(self, variant: Variant, family: Family, suffix: str) -> str | None:
        path = self._find_program(f"{program(variant, family)}{suffix}")
        if path is None and variant is self._default:
            # Distributions with one variant only have no names for each.
            path = self._find_program(f"{program(None, family)}{suffix}")
        return path

    async def _run(self, command: Sequence[str], text: str) -> tuple[bytes, str]:
        """Run a tool; return what it printed and said. Raise the error that its failure means."""
        run = await ended(command, text, PATIENCE_SECONDS, self._inherited)
        if run.code == 0:
            return run.printed, run.said
        raise failure(run.code, os.path.basename(command[0]), run.said, text)


def program(variant: Variant | None, family: Family) -> str:
    """Return the name of the tool without its suffix, such as ``ip6tables-nft``."""
    name = "ip6tables" if family is Family.IPV6 else "iptables"
    return name if variant is None else f"{name}-{variant}"


def failure(code: int, name: str, said: str, text: str = "") -> DataplaneError:
    """Return the error that a failed run means; `text` is what the tool was fed."""
    lines = [one for one in said.splitlines() if one.strip() and not one.startswith("# Warning")]
    first = " ".join(_INTRODUCTION.sub("", one).strip() for one in lines[:2]).strip()
    if code in (-signal.SIGABRT, -signal.SIGSEGV):
        return RejectedAt(name, f"{name} crashed (signal {-code})", 0)
    if code < 0:
        return UnknownResult(f"{name} was ended by signal {-code}: {first}")
    if "Operation not permitted" in said or "Permission denied" in said:
        return Unsupported("CAP_NET_ADMIN", "run as root, or inside `unshare -Urnm`")
    if code == _RESOURCE_PROBLEM and "failed" not in said:
        return Busy(first or f"{name}: the kernel is short of something")
    line = int(found[1]) if (found := _LINE.search(said)) else 0
    told = text.splitlines()[line - 1] if 0 < line <= text.count("\n") else ""
    if _GONE.search(said) or told.startswith(("-C", "-D", "-X", "-R")):
        return OutOfStep(f"{first}: {told}" if told else first)
    if any(one in said for one in _TRANSIENT):
        return Busy(first)
    for pattern, what in _MISSING:
        missing = pattern.search(said)
        if missing:
            return Unsupported(f"{name}: {what.format(*missing.groups())}", INSTALL)
    return RejectedAt(f"{name}: {told}" if told else name, first, line)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def loaded(family: Family, table: str) -> bool:
    """Return whether a legacy table exists in this network namespace; listing would make it."""
    try:
        path = f"/proc/thread-self/net/ip{'6' if family is Family.IPV6 else ''}_tables_names"
        with open(path, encoding="ascii") as names:
            return table in names.read().split()
    except OSError:
        return False


def _lock_is_held() -> bool:
    """Return whether another program holds the xtables lock at this moment."""
    try:
        lock = os.open(os.environ.get("XTABLES_LOCKFILE", LOCK), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _has_rules(texts: dict[tuple[Family, str], str]) -> bool:
    """Return whether there are rules of anybody, ours included."""
    return any(line.startswith("-A") for text in texts.values() for line in text.splitlines())


def _our_chains(text: str) -> list[str]:
    return [
        line[1:].split(" ", 1)[0] for line in text.splitlines() if line.startswith(f":{PREFIX}")
    ]
