"""The skeleton: what keeps NAT and connection tracking on, whichever dataplane comes and goes.

Lives here: putting it there and taking it away. It is two tables, the same in every mode, and has
to be there before the first flow begins (backends/nftables/pipeline.py says why). Must not: know
modes.
"""

from collections.abc import Sequence

from vipd.backends.nftables import tables
from vipd.backends.nftables.objects import FAMILY_WORD, SKELETON
from vipd.backends.nftables.pipeline import skeleton
from vipd.backends.nftables.plan import skeleton_commands
from vipd.backends.nftables.tool import Nft
from vipd.proxy.names import Family


class Skeleton:
    """The tables ``ip vipd-skeleton`` and ``ip6 vipd-skeleton``."""

    def __init__(self, nft: Nft) -> None:
        self._nft = nft

    async def ensure(self) -> bool:
        """Put it there, whatever is left of it; return False where this host has no nft.

        Without nft the only NAT mode is iptables, whose tables have the same effect once loaded.
        """
        if self._nft.path is None:
            return False
        text = "".join(f"{line}\n" for family in Family for line in skeleton_commands(family))
        await self._nft.run(["-f", "-"], text)
        return True

    async def mend(self) -> int:
        """Put back what is missing of it; return of how many families that was."""
        if self._nft.path is None:
            return 0
        missing = [word for word in FAMILY_WORD.values() if not _is_whole(word)]
        if missing:
            await self.ensure()
        return len(missing)

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


def _is_whole(word: str) -> bool:
    """Return whether the one rule of a family's skeleton is there, and no other."""
    chain = skeleton()
    (comment,) = chain.comments
    there = tables.rules(word, SKELETON, chain.name)
    return len(there) == 1 and f"{comment}\0".encode() in there[0]
