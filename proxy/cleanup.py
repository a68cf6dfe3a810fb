"""What vipd leaves on a node, and taking it away: every mode, the skeleton, the record, the socket.

Lives here: finding and removing, in the words of those who own the pieces. Must not: print.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog
from msgspec import Struct

from vipd.backends.nftables.tool import INSTALL, Nft
from vipd.backends.registry import MODES, backend
from vipd.backends.skeleton import Skeleton
from vipd.proxy import control
from vipd.proxy.errors import DataplaneError, Unsupported
from vipd.proxy.record import RECORD
from vipd.proxy.settings import DataplaneSettings

log = structlog.get_logger()


class Cleaned(Struct):
    """What was found, in sentences: removed (or would be), left to others, and what failed."""

    removed: list[str] = []
    left: list[str] = []
    unknown: list[str] = []
    """Where this host has not the means to look: something of ours may be there."""
    failed: list[str] = []

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note what goes wrong inside, and go on."""
        try:
            yield
        except Unsupported as error:
            if error.capability == "CAP_NET_ADMIN":
                self.failed.append(f"{what}: {error}")
            else:
                self.unknown.append(f"{what}: cannot look: {error}")
        except DataplaneError as error:
            self.failed.append(f"{what}: {error}")


async def clean_at_exit(socket: str, inherited: Sequence[int]) -> None:
    """Remove everything of vipd's, and log what it was. `inherited` holds the daemon's lock."""
    done = await clean(socket, MODES, inherited, dry_run=False, kube_proxy=False)
    log.info("dataplane removed", what="; ".join(done.removed) or "nothing was there")
    for one in (*done.unknown, *done.failed):
        log.warning("not removed", why=one)


async def clean(
    socket: str, modes: Sequence[str], inherited: Sequence[int], *, dry_run: bool, kube_proxy: bool
) -> Cleaned:
    """Remove what the modes left; with all of them, also what they share.

    Idempotent. Only objects that vipd owns are touched, and with `kube_proxy` those of kube-proxy.
    The kernel keeps what it has when a tool is uninstalled, so a mode whose tools this host lacks
    may have left something: it is told as unknown.
    """
    done = Cleaned()
    state = Path(socket).parent
    for mode in modes:
        driver = backend(mode, DataplaneSettings(), inherited, state).driver
        with done.attempt(mode):
            done.removed += await (driver.leftovers() if dry_run else driver.teardown())
    if set(modes) == set(MODES):
        await _clean_skeleton(done, Nft(inherited=inherited), dry_run=dry_run)
        await _clean_dns(done, state, dry_run=dry_run)
        _clean_files(done, socket, dry_run=dry_run)
    from vipd.backends import kube_proxy as foreign

    with done.attempt("kube-proxy's leftovers"):
        outcome = await foreign.remove(dry_run=dry_run or not kube_proxy)
        theirs = [f"kube-proxy's {one}" for one in outcome.removed]
        if kube_proxy:
            done.removed += theirs
            done.failed += outcome.failed
        else:
            done.left += theirs
    return done


async def _clean_dns(done: Cleaned, state: Path, *, dry_run: bool) -> None:
    from vipd.dns.server import service, way

    with done.attempt("DNS"):
        done.removed += await service.leftovers(state, remove=not dry_run)
        done.removed += await way.leftovers(remove=not dry_run)


async def _clean_skeleton(done: Cleaned, nft: Nft, *, dry_run: bool) -> None:
    skeleton = Skeleton(nft)
    with done.attempt("skeleton"):
        if nft.path is None:
            raise Unsupported("nft is not there", INSTALL)
        done.removed += await (skeleton.leftovers() if dry_run else skeleton.remove())


def _clean_files(done: Cleaned, socket: str, *, dry_run: bool) -> None:
    """Remove the record of the mode, a draft of it that a crash left, and the socket."""
    state = Path(socket).parent
    for record in (state / RECORD, state / f".{RECORD}"):
        try:
            if dry_run:
                record.lstat()
            else:
                record.unlink()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            done.failed.append(f"file {record}: {error.strerror}")
        else:
            done.removed.append(f"file {record}")
    try:
        if os.path.exists(socket) and (dry_run or control.discard(socket)):
            done.removed.append(f"socket {socket}")
    except OSError as error:
        done.failed.append(f"socket {socket}: {error.strerror}")
