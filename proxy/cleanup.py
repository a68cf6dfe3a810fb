"""What vipd leaves on a node, and taking it away: every mode, the skeleton, the record, the socket.

Lives here: finding and removing, in the words of those who own the pieces. Must not: print.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from vipd.backends.nftables.tool import Nft
from vipd.backends.registry import MODES, backend
from vipd.backends.skeleton import Skeleton
from vipd.proxy import control
from vipd.proxy.errors import DataplaneError, Unsupported
from vipd.proxy.settings import DataplaneSettings
from vipd.proxy.switching import RECORD


class Cleaned(Struct):
    """What was found, in sentences: removed (or would be), left to others, and what failed."""

    removed: list[str] = []
    left: list[str] = []
    failed: list[str] = []


async def clean(
    socket: str, modes: Sequence[str], inherited: Sequence[int], *, dry_run: bool, kube_proxy: bool
) -> Cleaned:
    """Remove what the modes left; with all of them, also what they share.

    A mode whose tools this host lacks has left nothing. Idempotent. Only objects that vipd owns are
    touched, and with `kube_proxy` those of kube-proxy.
    """
    done = Cleaned()
    state = Path(socket).parent
    for mode in modes:
        driver = backend(mode, DataplaneSettings(), inherited, state).driver
        try:
            done.removed += await (driver.leftovers() if dry_run else driver.teardown())
        except Unsupported:
            continue
        except DataplaneError as error:
            done.failed.append(f"{mode}: {error}")
    if set(modes) == set(MODES):
        await _clean_shared(done, socket, inherited, dry_run=dry_run)
    from vipd.backends import kube_proxy as foreign

    try:
        outcome = await foreign.remove(dry_run=dry_run or not kube_proxy)
        theirs = [f"kube-proxy's {one}" for one in outcome.removed]
        if kube_proxy:
            done.removed += theirs
            done.failed += outcome.failed
        else:
            done.left += theirs
    except DataplaneError as error:
        done.failed.append(f"kube-proxy's leftovers: {error}")
    return done


async def _clean_shared(
    done: Cleaned, socket: str, inherited: Sequence[int], *, dry_run: bool
) -> None:
    skeleton = Skeleton(Nft(inherited=inherited))
    try:
        done.removed += await (skeleton.leftovers() if dry_run else skeleton.remove())
    except DataplaneError as error:
        done.failed.append(f"skeleton: {error}")
    record = Path(socket).parent / RECORD
    if record.exists():
        if not dry_run:
            record.unlink()
        done.removed.append(f"file {record}")
    if os.path.exists(socket) and (dry_run or control.discard(socket)):
        done.removed.append(f"socket {socket}")
