"""The dataplanes that the tests with real packets run over, and what each needs of this machine.

Lives here: the modes by the names that test ids have, iptables once with each variant of its tool,
and which tests a mode runs. Must not: know what a mode does.

A test is run in the modes that the closest marker `modes` names, nftables where there is none.
Those marked `essential` are run everywhere; the others where running them is cheap, see `kept`.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
EMULATED = "VIPD_VM" in os.environ
"""Whether this is the machine of tests/vm, in which everything takes its time."""
PATIENCE = 5 if EMULATED else 1
"""What times that are waited for are multiplied with."""


class Mode(NamedTuple):
    """One way to run the daemon. `program` is what `iptables` is on its PATH, empty: the host's."""

    name: str
    mode: str
    program: str = ""
    is_cheap: bool = True
    """Whether it is worth the time to run every test; otherwise the essential ones are."""

    def __str__(self) -> str:
        return self.name

    def obstacle(self) -> str | None:
        """Why this machine cannot run it, or None."""
        if self.program and shutil.which(self.program, path=_PATH) is None:
            return f"no {self.program} here (apt-get install iptables)"
        if self.mode == "ipvs" and not _has_ipvs():
            return "this kernel has no IPVS; tests/vm runs this with one that has"
        return None

    @contextlib.contextmanager
    def chosen(self, folder: Path) -> Iterator[None]:
        """Let the programs that are started meanwhile find this variant of iptables."""
        if not self.program:
            yield
            return
        target = shutil.which(self.program, path=_PATH)
        assert target is not None
        for family in ("ip", "ip6"):
            for suffix in ("", "-save", "-restore"):
                (folder / f"{family}tables{suffix}").symlink_to(target)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
            yield


NFTABLES = Mode("nftables", "nftables", is_cheap=not EMULATED)
LEGACY = Mode("iptables-legacy", "iptables", "xtables-legacy-multi", is_cheap=not EMULATED)
NFT_VARIANT = Mode("iptables-nft", "iptables", "xtables-nft-multi", is_cheap=False)
IPVS = Mode("ipvs", "ipvs", is_cheap=not EMULATED)
USERSPACE = Mode("userspace", "userspace", is_cheap=False)
MODES = {one.name: one for one in (NFTABLES, LEGACY, NFT_VARIANT, IPVS, USERSPACE)}

CHOICE = "VIPD_TEST_MODES"
"""Names of modes, comma-separated: nothing but these modes, and in them everything."""
IN_THE_MACHINE = ("ipvs", "nftables")
"""The modes of which tests/vm runs the essential tests with Debian's kernel."""


def named(marker: pytest.Mark | None) -> list[Mode]:
    """The modes that a test is run in."""
    names = marker.args if marker is not None else (NFTABLES.name,)
    chosen = os.environ.get(CHOICE, ",".join(MODES)).split(",")
    return [MODES[one] for one in names if one in chosen]


def kept(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests that are worth their time.

    The nftables mode runs everything. The others meet each test with two of the four flavours, or
    with one under emulation: the next ones in turn, so that every flavour is met. Where a mode is
    not cheap, only the essential tests are run.
    """
    if CHOICE in os.environ:
        return items
    numbers: dict[str, int] = {}
    return [one for one in items if _is_kept(one, numbers)]


_TURNS = ("IPv4-TCP", "IPv4-UDP", "IPv6-UDP", "IPv6-TCP")
"""Two steps apart both family and protocol are other ones."""


def _is_kept(item: pytest.Item, numbers: dict[str, int]) -> bool:
    values = getattr(item, "callspec", None)
    mode = values.params.get("mode") if values is not None else None
    if not isinstance(mode, Mode) or (mode.is_cheap and not mode.program):
        return True
    if not mode.is_cheap and item.get_closest_marker("essential") is None:
        return False
    flavour = str(values.params["flavour"]) if values and "flavour" in values.params else None
    if flavour is None:
        return True
    same = item.nodeid.replace(flavour, "")
    turn = _TURNS.index(flavour) + numbers.setdefault(same, len(numbers))
    return turn % (len(_TURNS) if EMULATED else 2) == 0


def _has_ipvs() -> bool:
    there = Path("/proc/net/ip_vs")
    tool = shutil.which("modprobe", path=_PATH)
    if not there.exists() and tool is not None:
        subprocess.run([tool, "--quiet", "ip_vs"], capture_output=True, check=False)
    return there.exists()
