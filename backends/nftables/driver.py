"""The nftables driver: runs `nft` and says in our words what it said.

Lives here: the one effect of this backend. Must not: know what a program means (compile.py).
Only the tables of objects.py are ever listed or changed.
"""

import asyncio
import os
import re
import shutil
import signal
from collections.abc import Sequence

import msgspec

from vipd.backends.nftables.compile import Shared
from vipd.backends.nftables.objects import FAMILY_WORD, SKELETON, TABLE
from vipd.backends.nftables.observed import Observed, decode
from vipd.backends.nftables.plan import NftPlan, Unit, compile_program, discard, plan, transaction
from vipd.backends.protocol import Capabilities, Capability, Committed
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, Rejected, UnknownResult, Unsupported
from vipd.proxy.virtualserver import Key, NodeNetwork

LARGEST_TRANSACTION = 10_000
"""Elements in one transaction. A cold start in larger ones is hardly faster, and `nft` needs
about 1 kB of memory for each element."""
AT_ONCE = 2
"""Runs of nft side by side."""
PATIENCE_SECONDS = 300.0
"""How long one run of nft may take before it is killed; 250,000 elements take about 4 s."""
INSTALL = "install Debian's package nftables (1.0.1 or newer)"
_OUR_TABLES = [(word, name) for word in FAMILY_WORD.values() for name in (TABLE, SKELETON)]

# What the program needs of the kernel, each with a probe and the module that brings it.
_FEATURES = (
    ("nft_fib", "fib daddr type local", "kernel modules nft_fib, nft_fib_ipv4, nft_fib_ipv6"),
    ("nft_numgen", "meta priority set numgen random mod 2 offset 1", "kernel module nft_numgen"),
    ("nft_hash", "meta priority set jhash ip saddr mod 2", "kernel module nft_hash"),
    ("nft_reject", "reject", "kernel modules nft_reject, nft_reject_ipv4"),
    ("nft_ct", "ct state new", "kernel modules nft_ct, nf_conntrack"),
)


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
        found = [await self._probe_tool()]
        if found[0].present:
            found += await self._probe_kernel()
        return Capabilities("nftables", tuple(found))

    async def observe(self) -> Observed | None:
        """Return what our tables hold, or None when there are none."""
        listing = await self._run(["--json", "list", "tables"])
        tables = msgspec.json.decode(listing, type=_Listing).names()
        ours = [one for one in _OUR_TABLES if one in tables]
        if not ours:
            return None
        return decode(
            [await self._run(["--json", "list", "table", word, name]) for word, name in ours]
        )

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

    async def _commit(self, plan: NftPlan) -> Committed:
        rejected: dict[Key, DataplaneError] = {}
        prologue = plan.prologue
        for units in _cut(plan):
            text = transaction(prologue, units)
            rejected |= await self._commit_units(prologue, units, text)
            prologue = ()
        await self._discard(plan)
        return Committed(rejected)

    async def teardown(self) -> Sequence[str]:
        """Remove our tables and say which there were."""
        listing = await self._run(["--json", "list", "tables"])
        tables = msgspec.json.decode(listing, type=_Listing).names()
        ours = [f"table {word} {name}" for word, name in _OUR_TABLES if (word, name) in tables]
        if ours:
            await self._run(["-f", "-"], "".join(f"delete {one}\n" for one in ours))
        return ours

    async def _commit_units(
        self, prologue: Sequence[str], units: Sequence[Unit], text: str
    ) -> dict[Key, DataplaneError]:
        """Commit units in one transaction, or in halves until the rejected ones stand alone."""
        try:
            await self._run(["-f", "-"], text)
        except Rejected as error:
            if not units:
                raise
            if len(units) == 1 and not prologue:
                (unit,) = units
                if unit.key is None:
                    raise
                return {unit.key: error}
            middle = len(units) // 2
            rejected: dict[Key, DataplaneError] = {}
            # A prologue goes first and alone: if it is at fault, that is the whole program's.
            parts: list[tuple[Sequence[str], Sequence[Unit]]] = [(prologue, ())] if prologue else []
            parts += [((), units[:middle]), ((), units[middle:])]
            for head, part in parts:
                if head or part:
                    rejected |= await self._commit_units(head, part, transaction(head, part))
            return rejected
        return {}

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
        try:
            await self._run(["-f", "-"], discard(self._garbage))
        except Busy:
            return
        except (Rejected, OutOfStep):
            pass  # somebody else removed them: nothing is left to do
        self._garbage = set()

    async def _probe_tool(self) -> Capability:
        if self._nft is None:
            return Capability("nft", False, remedy=INSTALL)
        try:
            text = (await self._run(["--version"])).decode()
        except DataplaneError as error:
            return Capability("nft", False, str(error), INSTALL)
        version = re.search(r"v(\d+)\.(\d+)\.(\d+)", text)
        numbers = tuple(map(int, version.groups())) if version else (0, 0, 0)
        return Capability("nft", numbers >= (1, 0, 1), text.strip(), INSTALL)

    async def _probe_kernel(self) -> list[Capability]:
        """Try the whole program without committing; only if it fails, find out which part."""
        network = NodeNetwork()
        text = str(plan(None, compile_program((), network))[0])
        try:
            await self._run(["--check", "-f", "-"], text)
        except Unsupported as error:
            return [Capability(error.capability, False, remedy=error.remedy)]
        except DataplaneError as error:
            found = [await self._probe_feature(*feature) for feature in _FEATURES]
            if all(one.present for one in found):
                found.append(Capability("the program", False, str(error)))
            return found
        return [Capability(name, True) for name, _, _ in _FEATURES]

    async def _probe_feature(self, name: str, rule: str, remedy: str) -> Capability:
        text = (
            "add table ip vipd-probe\n"
            "add chain ip vipd-probe c { type filter hook output priority 0; }\n"
            f"add rule ip vipd-probe c {rule}\n"
        )
        try:
            await self._run(["--check", "-f", "-"], text)
        except DataplaneError as error:
            return Capability(name, False, str(error), remedy)
        return Capability(name, True)

    async def _run(self, arguments: list[str], text: str = "") -> bytes:
        """Run nft and return what it printed; raise the DataplaneError that its failure means."""
        if self._nft is None:
            raise Unsupported("nft is not there", INSTALL)
        # A file in memory instead of a pipe: nft reads it at its own pace, whatever else this
        # process is computing.
        script = os.memfd_create("nft-script")
        try:
            left = memoryview(text.encode())
            while left:
                left = left[os.write(script, left) :]
            os.lseek(script, 0, os.SEEK_SET)
            process = await asyncio.create_subprocess_exec(
                self._nft,
                *arguments,
                stdin=script,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C"},
                pass_fds=self._inherited,
            )
        finally:
            os.close(script)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                printed, complaint = await process.communicate()
        except TimeoutError as error:
            process.kill()
            await process.wait()
            raise UnknownResult(f"nft did not end within {PATIENCE_SECONDS:.0f} s") from error
        if process.returncode == 0:
            return printed
        raise _error(
            process.returncode or 0, " ".join(arguments), complaint.decode(errors="replace")
        )


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


def _cut(plan: NftPlan) -> list[tuple[Unit, ...]]:
    """Return the units in groups of bounded size; at least one group where there is a prologue."""
    if plan.whole:
        return [plan.units]
    groups: list[tuple[Unit, ...]] = []
    group: list[Unit] = []
    size = 0
    for unit in plan.units:
        if group and size + unit.size > LARGEST_TRANSACTION:
            groups.append(tuple(group))
            group, size = [], 0
        group.append(unit)
        size += unit.size
    if group or (plan.prologue and not groups):
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
    if "Device or resource busy" in complaint or "No buffer space" in complaint:
        return Busy(first)
    if "No such file or directory" in complaint or "File exists" in complaint:
        return OutOfStep(first)
    return Rejected(f"nft {operation}", first)
