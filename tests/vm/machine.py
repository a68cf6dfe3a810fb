"""One run of the virtual machine: boot, run one command in it, print what it prints, end.

The machine has this machine's files at the same paths (over 9p, with a layer in memory that takes
every change), Debian's kernel with all of its modules, no network but its own, and root. Lives
here: qemu's command line, the script that the machine runs, both deadlines. Must not: know tests.
"""

import fcntl
import os
import selectors
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, NamedTuple

from tests.vm.initramfs import PORT, RESULTS, initramfs
from tests.vm.kernel import Kernel, MissingError, debian_kernel

QEMU = "qemu-system-x86_64"
VARIABLE = "VIPD_VM"
"""Set in the machine: to the version of its kernel."""
PASSED = ("PATH", "HOME", "LANG", "PYTHONPATH", "CI", "VIPD_", "PYTEST_")
"""Beginnings of the names of variables that the machine takes over."""
PRELOADED = (
    *("nf_*", "nft_*", "nfnetlink*", "ip_set*", "ip_vs*", "x_tables", "xt_*"),
    *("ip_tables", "ip6_tables", "iptable_*", "ip6table_*", "ipt_*", "ip6t_*"),
)
"""Modules that pytest finds loaded, as on a node that has been up for a while: loading one on
demand takes a fifth of a second under emulation, and a first commit needs some thirty."""
KILLED = 124
"""The status of a run that was ended at a deadline, as that of `timeout` (coreutils)."""
_CREATE_API = 0xAE00  # KVM_GET_API_VERSION, linux/kvm.h
_TAIL_LINES = 60


class Limits(NamedTuple):
    """What a machine may take; seconds of the host's clock."""

    deadline: float = 1800
    silence: float = 300
    """How long it may print nothing once it is up."""
    boot: float = 90
    cpus: int = 2
    megabytes: int = 2048


def available() -> Kernel:
    """The kernel to boot; MissingError says what a machine needs that is not here."""
    if _tool(QEMU) is None:
        raise MissingError(f"no {QEMU} (apt-get install qemu-system-x86)")
    return debian_kernel()


def run(
    kernel: Kernel,
    command: Sequence[str],
    results: Path | None = None,
    limits: Limits | None = None,
    output: IO[bytes] | None = None,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run a command in a new machine, here and with our environment; return its exit status.

    What it writes to /run/vm is in the folder `results` afterwards; what it prints goes to
    `output` at once. At a deadline the machine is killed, the end of the kernel's log is printed
    and the status is 124; a machine that ended by itself without a status gives 125.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="vipd-vm-") as text:
        folder = Path(text)
        shared = results if results is not None else folder
        (folder / "initramfs").write_bytes(initramfs(kernel))
        (shared / "modules").write_text(str(kernel.modules))
        (shared / "script").write_text(_script(kernel, command, variables or {}))
        (shared / "status").unlink(missing_ok=True)
        log = folder / "kernel.log"
        why = _follow(
            _qemu(kernel, folder / "initramfs", shared, log, limits),
            limits,
            output or sys.stdout.buffer,
        )
        status = shared / "status"
        if why is None and status.exists():
            return int(status.read_text())
        tail = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if log.exists() else []
        why = why or "the machine ended before the command did"
        _say(output or sys.stdout.buffer, f"vm: {why}; the end of its kernel's log:", *tail)
        return KILLED if why.startswith("killed") else KILLED + 1


def pytest_command(kernel: Kernel, *arguments: str) -> list[str]:
    """Return the command that runs pytest in the machine, with the modules it needs loaded."""
    names = {one.name.partition(".")[0] for one in (kernel.modules / "kernel/net").rglob("*.ko*")}
    names |= {"veth", "dummy"}
    loaded = sorted(one for one in names if any(fnmatch(one, want) for want in PRELOADED))
    inner = shlex.join([sys.executable, "-m", "pytest", *arguments])
    return ["/bin/sh", "-c", f"modprobe --all {' '.join(loaded)}; exec {inner}"]


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _script(kernel: Kernel, command: Sequence[str], more: Mapping[str, str]) -> str:
    """What the machine's first process runs."""
    variables = {k: v for k, v in os.environ.items() if k.startswith(PASSED)}
    variables |= {"PYTHONUNBUFFERED": "1", VARIABLE: kernel.version, **more}
    variables["PATH"] = variables.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin"
    exports = "\n".join(f"export {name}={shlex.quote(v)}" for name, v in variables.items())
    return f"""{exports}
exec </dev/null >{PORT} 2>&1
ip link set lo up
ulimit -n 65536
cd {shlex.quote(os.getcwd())}
echo "vm: Linux {kernel.version}, {_accelerator()}, up $(cut -d' ' -f1 /proc/uptime) s"
{shlex.join(command)}
echo $? >{RESULTS}/status
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


def _accelerator() -> str:
    """KVM where it can work, else emulation."""
    chosen = os.environ.get("VIPD_VM_ACCELERATOR")
    if chosen:
        return chosen
    # A machine that is virtual itself may have the device without the processor's support for it.
    flags = Path("/proc/cpuinfo").read_text().split()
    if "vmx" in flags or "svm" in flags:
        try:
            with open("/dev/kvm", "r+b", buffering=0) as device:
                fcntl.ioctl(device, _CREATE_API)
        except OSError:
            return "tcg"
        return "kvm"
    return "tcg"


def _qemu(kernel: Kernel, archive: Path, results: Path, log: Path, limits: Limits) -> list[str]:
    accelerator = _accelerator()
    shares = {
        "host": "path=/,readonly=on,multidevs=remap",
        "results": f"path={str(results).replace(',', ',,')}",
    }
    command = [
        *("setpriv", "--pdeathsig", "KILL", _tool(QEMU) or QEMU),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"),
        *("-accel", "tcg,thread=multi" if accelerator == "tcg" else accelerator),
        *("-cpu", "max", "-smp", str(limits.cpus), "-m", str(limits.megabytes)),
        *("-kernel", str(kernel.image), "-initrd", str(archive)),
        # Mitigations cost emulated time and protect nobody here; a panic ends the run.
        *("-append", "console=ttyS0 loglevel=6 panic=-1 mitigations=off"),
        *("-serial", f"file:{log}"),
        # Not stdio: that one is closed for the machine too when its input ends.
        *("-chardev", "file,id=output,path=/dev/fd/1"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=output"),
        *("-device", "virtio-rng-pci"),
    ]
    for tag, options in shares.items():
        command += ["-fsdev", f"local,id={tag},security_model=none,{options}"]
        command += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return command


def _follow(command: list[str], limits: Limits, output: IO[bytes]) -> str | None:
    """Print what it prints until it ends; say why where it was killed."""
    begin = time.monotonic()
    heard = begin
    is_up = False
    with (
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
        selectors.DefaultSelector() as ready,
    ):
        assert process.stdout is not None
        ready.register(process.stdout, selectors.EVENT_READ)
        try:
            while True:
                ends = {f"killed: not done in {limits.deadline:.0f} s": begin + limits.deadline}
                if is_up:
                    ends[f"killed: nothing printed in {limits.silence:.0f} s"] = (
                        heard + limits.silence
                    )
                else:
                    ends[f"killed: not up in {limits.boot:.0f} s"] = begin + limits.boot
                why = min(ends, key=lambda one: ends[one])
                if not ready.select(max(0.0, ends[why] - time.monotonic())):
                    return why
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    return None
                heard, is_up = time.monotonic(), True
                output.write(part)
                output.flush()
        finally:
            process.kill()


def _say(output: IO[bytes], *lines: str) -> None:
    output.write("".join(f"{one}\n" for one in lines).encode())
    output.flush()
