"""The program `nft`: how it is run, and in our words what it said.

Lives here: one run of nft, its listing of tables, and the DataplaneError that a failure means. Must
not: know what a transaction is about (driver.py, backends/skeleton.py).
"""

import os
import shutil
import signal
from collections.abc import Sequence

from vipd.backends.nftables import tables
from vipd.backends.tool_run import ended
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, Rejected, UnknownResult, Unsupported

INSTALL = "install Debian's package nftables (1.0.1 or newer)"
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


class Nft:
    """Runs nft in the network namespace of this process.

    `path` is where nft is, looked for when None; `inherited` are descriptors that each run holds
    too: the lock of instance.py.
    """

    def __init__(self, path: str | None = None, inherited: Sequence[int] = ()) -> None:
        self.path = path or shutil.which(
            "nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        )
        self._inherited = tuple(inherited)

    async def run(self, arguments: list[str], text: str = "") -> bytes:
        """Run nft and return what it printed; raise the DataplaneError that its failure means."""
        if self.path is None:
            raise Unsupported("nft is not there", INSTALL)
        run = await ended([self.path, *arguments], text, PATIENCE_SECONDS, self._inherited)
        if run.code == 0:
            return run.printed
        raise _error(run.code, " ".join(arguments), run.said)

    async def tables(self) -> set[tuple[str, str]]:
        """Return every table there is: (family word, name). Unsupported where nft is not there."""
        if self.path is None:
            raise Unsupported("nft is not there", INSTALL)
        return tables.listed()


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
