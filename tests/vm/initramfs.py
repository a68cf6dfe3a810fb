"""What the virtual machine boots from: a cpio archive with busybox, a few modules and /init.

Lives here: the archive (`newc`, kernel Documentation/driver-api/early-userspace/buffer-format) and
the first steps in the machine, up to handing over to the script of the run. Must not: know what is
run. Everything is in memory, nothing here runs a program.
"""

import lzma
from pathlib import Path

from tests.vm.kernel import Kernel

MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console", "virtio_rng")
RESULTS = "/run/vm"
"""Where the machine sees the run's folder, writable."""
PORT = "/dev/vport0p1"
"""What is written here is printed by the run."""

_MOUNT_9P = "trans=virtio,version=9p2000.L,msize=512000"
_INIT = f"""#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /host /change /root
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do $b insmod /modules/$module; done
# The host's files, and over them a layer in memory that takes every change.
$b mount -t 9p -o {_MOUNT_9P},ro,cache=loose host /host
$b mount -t tmpfs -o size=75% change /change
$b mkdir /change/upper /change/work
$b mount -t overlay -o lowerdir=/host,upperdir=/change/upper,workdir=/change/work root /root
for one in proc sys dev; do $b mkdir -p /root/$one; $b mount -o move /$one /root/$one; done
$b mkdir -p /root/dev/pts /root/dev/shm /root/run
$b mount -t devpts -o ptmxmode=666 devpts /root/dev/pts
$b mount -t tmpfs shm /root/dev/shm
$b mount -t tmpfs run /root/run
$b mkdir -p /root{RESULTS} /root/run/lock /root/run/netns
$b mount -t 9p -o {_MOUNT_9P},cache=none results /root{RESULTS}
version=$($b uname -r)
$b mkdir -p /root/lib/modules/$version
$b mount -o bind "/root$($b cat /root{RESULTS}/modules)" /root/lib/modules/$version
exec $b switch_root /root /bin/sh {RESULTS}/script
"""


def initramfs(kernel: Kernel) -> bytes:
    """The archive for a kernel, not compressed."""
    order = _with_needs(kernel)
    files = {
        "init": _INIT.encode(),
        "bin/busybox": kernel.busybox.read_bytes(),
        "modules/order": "\n".join(_name(one) for one in order).encode(),
        **{f"modules/{_name(one)}": _module(kernel.modules / one) for one in order},
    }
    folders = sorted({path.partition("/")[0] for path in files if "/" in path})
    entries = [_entry(one, 0o040755, b"") for one in folders]
    entries += [_entry(path, 0o100755, content) for path, content in files.items()]
    return b"".join([*entries, _entry("TRAILER!!!", 0, b"")])


def _with_needs(kernel: Kernel) -> list[str]:
    """Paths of the modules, each after those that it needs; what is built in is left out."""
    needs: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        # depmod lists the nearest need first, so the reverse can be inserted in turn.
        needs[path] = [*reversed(rest.split()), path]
    paths = {_name(path).removesuffix(".ko"): path for path in needs}
    wanted = (paths[one] for one in MODULES if one in paths)
    return list(dict.fromkeys(one for path in wanted for one in needs[path]))


def _name(path: str) -> str:
    return Path(path).name.removesuffix(".xz").replace("-", "_")


def _module(path: Path) -> bytes:
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def _entry(name: str, mode: int, content: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % one for one in fields)
    return _padded(head + encoded) + _padded(content)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 4)
