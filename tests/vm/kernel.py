"""The kernel of the virtual machine: Debian's own package, extracted to a cache, never installed.

Lives here: finding and fetching the packages with apt's own client over lists of its own (so that
neither the system's lists nor its packages change), and what is in them. Must not: run a machine.
"""

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

META_PACKAGE = "linux-image-amd64"
TOOLS = ("apt-get", "apt-cache", "dpkg-deb", "depmod")


class MissingError(Exception):
    """What the virtual machine needs is not here; the text says what, and how to get it."""


class Kernel(NamedTuple):
    """An extracted kernel package, and the static busybox that boots it."""

    version: str
    root: Path

    @property
    def image(self) -> Path:
        return self.root / "boot" / f"vmlinuz-{self.version}"

    @property
    def modules(self) -> Path:
        return self.root / "lib" / "modules" / self.version

    @property
    def busybox(self) -> Path:
        return self.root / "bin" / "busybox"


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "vipd", "vm")


def debian_kernel() -> Kernel:
    """The newest kernel in the cache, fetched where there is none; MissingError says why not."""
    if platform.machine() != "x86_64":
        raise MissingError(f"the machine for tests is x86_64, this is {platform.machine()}")
    there = _cached()
    return there if there is not None else _fetched()


def _cached() -> Kernel | None:
    found = sorted(cache().glob("linux-*/boot/vmlinuz-*"), key=lambda one: one.stat().st_mtime)
    return Kernel(found[-1].name.removeprefix("vmlinuz-"), found[-1].parents[1]) if found else None


def _fetched() -> Kernel:
    missing = [one for one in TOOLS if shutil.which(one, path=_path()) is None]
    if missing:
        raise MissingError(f"no {', '.join(missing)} to fetch Debian's kernel with")
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".fetch-") as text:
        draft = Path(text)
        package = _download(draft)
        root = draft / "root"
        for one in draft.glob("*.deb"):
            _run(draft, "dpkg-deb", "--extract", str(one), str(root))
        version = package.removeprefix("linux-image-")
        _run(draft, "depmod", "--basedir", str(root), version)
        final = cache() / f"linux-{version}"
        if not final.exists():  # else: another run was quicker
            root.rename(final)
    return Kernel(version, final)


def _download(into: Path) -> str:
    """Fetch the packages; return the kernel package's name."""
    lists = into / "lists"
    (lists / "partial").mkdir(parents=True)
    # Lists of its own: the system's may be empty or name a version that the mirror has no more.
    own = ("-o", f"Dir::State::lists={lists}", "-o", "APT::Sandbox::User=", "-o", "Dir::Cache=")
    _run(into, "apt-get", *own, "--quiet", "update")
    told = _run(into, "apt-cache", *own, "depends", META_PACKAGE)
    words = told.split()
    package = next((one for one in words[1:] if one.startswith("linux-image-")), None)
    if package is None:
        raise MissingError(f"apt knows no {META_PACKAGE}: {told.strip() or 'nothing'}")
    _run(into, "apt-get", *own, "--quiet", "download", package, "busybox-static")
    return package


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _run(where: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=where,
        env={**os.environ, "PATH": _path(), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        why = " ".join((done.stderr or done.stdout).split()[-40:])
        raise MissingError(f"{' '.join(command[:1])} for Debian's kernel: {why}")
    return done.stdout
