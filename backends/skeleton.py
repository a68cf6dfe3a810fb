"""The skeleton: what keeps NAT and connection tracking on, whichever dataplane comes and goes.

Lives here: putting it there and taking it away. It is two tables, the same in every mode, and has
to be there before the first flow begins (backends/nftables/pipeline.py says why). Must not: know
modes.
"""

import contextlib
from collections.abc import Sequence

from vipd.backends.nftables.chain_notes import ChainNotes
from vipd.backends.nftables.objects import FAMILY_WORD, SKELETON
from vipd.backends.nftables.pipeline import skeleton
from vipd.backends.nftables.plan import skeleton_commands
from vipd.backends.nftables.tool import Nft
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import Family


class Skeleton:
    """The tables ``ip vipd-skeleton`` and ``ip6 vipd-skeleton``."""

    def __init__(self, nft: Nft) -> None:
        self._nft = nft
        self._notes = ChainNotes()

    async def ensure(self) -> bool:
        """Put it there, whatever is left of it; return False where this host has no nft.

        Without nft the only NAT mode is iptables, whose tables have the same effect once loaded.
        """
        if self._nft.path is None:
            return False
        text = "".join(f"{line}\n" for family in Family for line in skeleton_commands(family))
        await self._nft.run(["-f", "-"], text)
        with contextlib.suppress(DataplaneError):  # then `mend` goes by what it sees first
            for family in Family:
                self._notes.note(family, SKELETON)
        return True

    async def mend(self) -> int:
        """Put back what is missing of it; return of how many families that was."""
        if self._nft.path is None:
            return 0
        repairs = {family: self._notes.repair(family, SKELETON, [skeleton()]) for family in Family}
        lines = [
            line
            for family, made in repairs.items()
            if made.lines
            for line in (f"add table {FAMILY_WORD[family]} {SKELETON}", *made.lines)
        ]
        if lines:
            await self._nft.run(["-f", "-"], "".join(f"{line}\n" for line in lines))
            self._notes.put_right(one for made in repairs.values() for one in made.written)
        return sum(bool(made.lines) for made in repairs.values())

    async def leftovers(self) -> Sequence[str]:
        """Return the tables that are there."""
        if self._nft.path is None:
            return []
        there = await self._nft.tables()
        words = FAMILY_WORD.values()
        return [f"table {word} {SKELETON}" for word in words if (word, SKELETON) in there]

    async def remove(self) -> Sequence[str]:
        """Take it away and say what was there. Flows of every NAT dataplane end with it."""
        ours = await self.leftovers()
        if ours:
            await self._nft.run(["-f", "-"], "".join(f"delete {one}\n" for one in ours))
        return ours
