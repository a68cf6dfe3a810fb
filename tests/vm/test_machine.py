"""The virtual machine itself: what comes back from it, and what becomes of one that hangs."""

import io
import shutil
from pathlib import Path

import pytest
from tests.netns.modes import EMULATED
from tests.vm import machine
from tests.vm.kernel import Kernel, MissingError

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(EMULATED, reason="this is the virtual machine"),
]


def shell(kernel: Kernel, text: str, results: Path, **limits: float) -> tuple[int, str]:
    printed = io.BytesIO()
    told = machine.Limits(**{"deadline": 300, "silence": 120, **limits})  # type: ignore[arg-type]
    status = machine.run(kernel, ["/bin/sh", "-c", text], results, told, printed)
    return status, printed.getvalue().decode()


def test_status_output_files_and_kernel_are_those_of_the_machine(
    kernel: Kernel, tmp_path: Path
) -> None:
    here = Path(__file__)
    text = f"""
        uname -r; pwd; cat {here} | wc -c
        modprobe ip_vs && ls /proc/net/ip_vs
        touch {here}.changed && echo written >/run/vm/told
        exit 7
    """
    status, printed = shell(kernel, text, tmp_path)
    lines = printed.splitlines()
    assert (status, lines[1:]) == (
        7,
        [kernel.version, str(Path.cwd()), str(here.stat().st_size), "/proc/net/ip_vs"],
    )
    assert (tmp_path / "told").read_text() == "written\n"
    assert not Path(f"{here}.changed").exists()


def test_a_machine_that_hangs_is_killed_and_its_log_is_shown(
    kernel: Kernel, tmp_path: Path
) -> None:
    text = "echo I wait; echo marked >/dev/kmsg; sleep 600"
    status, printed = shell(kernel, text, tmp_path, silence=5)
    assert status == machine.KILLED
    assert "I wait\nvm: killed: nothing printed in 5 s" in printed
    assert "marked" in printed


def test_a_kernel_that_dies_is_told_from_a_command_that_fails(
    kernel: Kernel, tmp_path: Path
) -> None:
    status, printed = shell(kernel, "echo c >/proc/sysrq-trigger", tmp_path)
    assert status == machine.KILLED + 1
    assert "sysrq triggered crash" in printed


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(MissingError, match="apt-get install qemu-system-x86"):
        machine.available()
