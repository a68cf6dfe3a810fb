"""The nftables driver: runs `nft` and says in our words what it said.

Lives here: the one effect of this backend. Must not: know what a program means (compile.py).
Only the tables of objects.py are ever listed or changed.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import Sequence

import msgspec
import structlog

from vipd.backends.nftables import probe
from vipd.backends.nftables.compile import Shared
from vipd.backends.nftables.objects import FAMILY_WORD, SKELETON, TABLE
from vipd.backends.nftables.observed import Observed, decode
from vipd.backends.nftables.plan import NftPlan, Unit, discard, transaction
from vipd.backends.protocol import Capabilities, Committed
from vipd.proxy.errors import (
    Busy,
    DataplaneError,
    OutOfStep,
    Rejected,
    UnknownResult,
    Unsupported,
)
from vipd.proxy.virtualserver import Key

LARGEST_TRANSACTION = 10_000
"""Elements in one transaction. A cold start in larger ones is hardly faster, and `nft` needs
about 1 kB of memory for each element."""
AT_ONCE = 2
"""Runs of nft side by side."""
_TRANSIENT = (
    "Device or resource busy",
    "No buffer space",
    "Cannot allocate memory",
    "Resource temporarily unavailable",
    "Too many open files",
    "Interrupted system call",
)
"""What errno texts say that the same transaction may work later."""
PATIENCE_SECONDS = 300.0
"""How long one run of nft may take before it is killed; 250,000 elements take about 4 s."""
_OUR_TABLES = [(word, name) for word in FAMILY_WORD.values() for name in (TABLE, SKELETON)]

log = structlog.get_logger()


class NftablesDriver:
    """Runs `nft` in the network namespace of this process.

    `inherited` are descriptors that each `nft` holds too: the lock of instance.py.
    """

    def __init__(self, nft: str | None = None, inherited: Sequence[int] = ()) -> None:
        self._inherited = tuple(inherited)
        self._nft = nft or shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        self._garbage: set[Shared] = set()
        self._order = asyncio.Lock()
        self._places = asyncio.Semaphore(AT_ONCE)

    async def probe(self) -> Capabilities:
        """Return what this host has and lacks for the mode. Changes nothing."""
        found = [await probe.tool(self._run)]
        if found[0].present:
            found += await probe.kernel(self._run)
        return Capabilities("nftables", tuple(found))

    async def observe(self) -> Observed | None:
        """Return what our tables hold, or None when there are none."""
        try:
            ours = await self._our_tables()
            if not ours:
                return None
            return decode(
                [await self._run(["--json", "list", "table", word, name]) for word, name in ours]
            )
        except Rejected as error:
            # A listing changes nothing, so it can always be tried again.
            raise UnknownResult(str(error)) from error
        except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
            raise UnknownResult(f"nft's listing is not understood: {error!r}") from error

    async def commit(self, plan: NftPlan) -> Committed:
        """Do the plan in transactions of bounded size.

        A caller may commit plans side by side, to use two processors for a cold start: what nft
        does itself takes longer than the kernel's part. A plan that declares something runs alone,
        because those after it use what it declares.
        """
        needed = AT_ONCE if plan.prologue else 1
        held = 0
        try:
            async with self._order:
                while held < needed:
                    await self._places.acquire()
                    held += 1
            return await self._commit(plan)
        finally:
            for _ in range(held):
                self._places.release()

    async def teardown(self) -> Sequence[str]:
        """Remove our tables and say which there were."""
        ours = [f"table {word} {name}" for word, name in await self._our_tables()]
        if ours:
            await self._run(["-f", "-"], "".join(f"delete {one}\n" for one in ours))
        return ours

    async def _our_tables(self) -> list[tuple[str, str]]:
        listing = await self._run(["--json", "list", "tables"])
        there = msgspec.json.decode(listing, type=_Listing).names()
        return [one for one in _OUR_TABLES if one in there]

    async def _commit(self, plan: NftPlan) -> Committed:
        rejected: dict[Key, DataplaneError] = {}
        units, prologue = plan.units, plan.prologue
        if plan.whole:
            # Services are away between the prologue and what follows, so find out first.
            units, rejected = await self._accepted(prologue, units)
            await self._run(["-f", "-"], transaction(prologue, units))
            units, prologue = (), ()
        for group in _cut(prologue, units):
            rejected |= await self._commit_units(prologue, group)
            prologue = ()
        await self._discard(plan)
        return Committed(rejected)

    async def _commit_units(
        self, prologue: Sequence[str], units: Sequence[Unit]
    ) -> dict[Key, DataplaneError]:
        """Commit units in one transaction, or in halves until the rejected ones stand alone."""
        try:
            await self._run(["-f", "-"], transaction(prologue, units))
        except Rejected as error:
            if prologue:
                # Alone: if it is at fault, that is the whole program's.
                await self._run(["-f", "-"], transaction(prologue, ()))
                return await self._commit_units((), units) if units else {}
            if len(units) == 1:
                return _alone(units[0], error)
            middle = len(units) // 2
            first = await self._commit_units((), units[:middle])
            return first | await self._commit_units((), units[middle:])
        return {}

    async def _accepted(
        self, prologue: Sequence[str], units: Sequence[Unit]
    ) -> tuple[tuple[Unit, ...], dict[Key, DataplaneError]]:
        """Return the units that would be accepted after the prologue, and the others' errors."""
        try:
            await self._run(["--check", "-f", "-"], transaction(prologue, units))
        except Rejected as error:
            if not units:
                raise
            if len(units) == 1:
                return (), _alone(units[0], error)
            middle = len(units) // 2
            good, bad = await self._accepted(prologue, units[:middle])
            more, worse = await self._accepted(prologue, units[middle:])
            return (*good, *more), bad | worse
        return tuple(units), {}

    async def _discard(self, plan: NftPlan) -> None:
        """Remove own chains and maps that nothing uses, now or after a later commit.

        Before 6.2 the kernel holds a chain in use for a moment after the element that led to it
        is gone (EBUSY), which is no reason to fail a commit.
        """
        declared = {
            Shared(unit.family, word, one.name)
            for unit in plan.units
            for word, objects in (("chain", unit.chains), ("map", unit.containers))
            for one in objects
        }
        self._garbage = (self._garbage | set(plan.garbage)) - declared
        if not self._garbage:
            return
        for group in (
            tuple(self._garbage),
            *((one,) for one in sorted(self._garbage, key=_chains_first)),
        ):
            if not self._garbage.issuperset(group):
                continue
            try:
                await self._run(["-f", "-"], discard(group))
            except Busy:
                continue  # one by one, or after a later commit
            except (Rejected, OutOfStep):
                if len(group) > 1:
                    continue
            self._garbage -= set(group)  # done, or somebody else did it

    async def _run(self, arguments: list[str], text: str = "") -> bytes:
        """Run nft and return what it printed; raise the DataplaneError that its failure means."""
        if self._nft is None:
            raise Unsupported("nft is not there", probe.INSTALL)
        try:
            process = await self._start(arguments, text)
        except OSError as error:
            # Even "no such file": a package upgrade puts it back in a moment.
            raise Busy(f"{self._nft} cannot be started: {error.strerror}") from error
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                printed, complaint = await process.communicate()
        except TimeoutError as error:
            process.kill()
            await process.wait()
            raise UnknownResult(f"nft did not end within {PATIENCE_SECONDS:.0f} s") from error
        if process.returncode == 0:
            return printed
        operation = " ".join(arguments)
        raise _error(process.returncode or 0, operation, complaint.decode(errors="replace"))

    async def _start(self, arguments: list[str], text: str) -> asyncio.subprocess.Process:
        # A file in memory instead of a pipe: nft reads it at its own pace, whatever else this
        # process is computing.
        script = os.memfd_create("nft-script")
        try:
            left = memoryview(text.encode())
            while left:
                left = left[os.write(script, left) :]
            os.lseek(script, 0, os.SEEK_SET)
            return await asyncio.create_subprocess_exec(
                self._nft or "nft",
                *arguments,
                stdin=script,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C"},
                pass_fds=self._inherited,
            )
        finally:
            os.close(script)


class _Listed(msgspec.Struct):
    table: dict[str, str | int] | None = None


class _Listing(msgspec.Struct):
    nftables: list[_Listed]

    def names(self) -> set[tuple[str, str]]:
        return {
            (str(one.table["family"]), str(one.table["name"]))
            for one in self.nftables
            if one.table is not None
        }


def _chains_first(one: Shared) -> tuple[bool, Shared]:
    return one.container != "chain", one


def _alone(unit: Unit, error: Rejected) -> dict[Key, DataplaneError]:
    """Return whom the rejection of a single unit concerns.

    Stray elements that cannot be removed concern nobody; the next observation meets them again.
    """
    if unit.key is None:
        log.warning("stray elements stay", why=str(error))
        return {}
    return {unit.key: error}


def _cut(prologue: Sequence[str], units: Sequence[Unit]) -> list[tuple[Unit, ...]]:
    """Return the units in groups of bounded size; at least one group where there is a prologue."""
    groups: list[tuple[Unit, ...]] = []
    group: list[Unit] = []
    size = 0
    for unit in units:
        if group and size + unit.size > LARGEST_TRANSACTION:
            groups.append(tuple(group))
            group, size = [], 0
        group.append(unit)
        size += unit.size
    if group or (prologue and not groups):
        groups.append(tuple(group))
    return groups


def _error(code: int, operation: str, complaint: str) -> DataplaneError:
    """Return the error that a failed run of nft means, by the errno text it printed."""
    first = next((line for line in complaint.splitlines() if "rror" in line), complaint.strip())
    if code in (-signal.SIGABRT, -signal.SIGSEGV):
        # nft 1.0.6 asserts on some input ("dreg < ctx->reg_low"): find out whose, as if refused.
        return Rejected(f"nft {operation}", f"nft crashed (signal {-code})")
    if code < 0:
        return UnknownResult(f"nft was ended by signal {-code}: {first}")
    if "Operation not permitted" in complaint:
        return Unsupported("CAP_NET_ADMIN", "run as root, or inside `unshare -Urnm`")
    if any(text in complaint for text in _TRANSIENT):
        return Busy(first)
    if "No such file or directory" in complaint or "File exists" in complaint:
        return OutOfStep(first)
    return Rejected(f"nft {operation}", first)
