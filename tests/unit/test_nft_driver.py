"""The nftables driver with a fake nft: error classes, bisecting, what nft is told and how."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from vipd.backends.nftables import driver as driver_module
from vipd.backends.nftables import tables
from vipd.backends.nftables import tool as tool_module
from vipd.backends.nftables.compile import Shared
from vipd.backends.nftables.driver import NftablesDriver
from vipd.backends.nftables.objects import Element
from vipd.backends.nftables.plan import NftPlan, Unit, compile_program, plan
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, Rejected, UnknownResult, Unsupported
from vipd.proxy.names import Family, Protocol
from vipd.proxy.virtualserver import Key, NodeNetwork

Fake = Callable[[str], NftablesDriver]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Return a maker of drivers whose nft is a shell script; it logs scripts to log/."""

    def make(body: str) -> NftablesDriver:
        (tmp_path / "log").mkdir(exist_ok=True)
        path = tmp_path / "nft"
        path.write_text(
            f"#!/bin/bash\nDIR={tmp_path}\nscript=$(cat)\n"
            'printf "%s\\n" "$script" > "$DIR/log/$(ls "$DIR/log" | wc -l)"\n'
            f"{body}\n"
        )
        path.chmod(0o755)
        return NftablesDriver(str(path))

    return make


def scripts(tmp_path: Path) -> list[str]:
    found = sorted((tmp_path / "log").iterdir(), key=lambda path: int(path.name))
    return [path.read_text().rstrip("\n") for path in found]


def key(number: int) -> Key:
    return Key(Family.IPV4, ip_address(f"10.96.0.{number}"), Protocol.TCP, 80)


def unit(number: int) -> Unit:
    element = Element("services", f"10.96.0.{number} . tcp . 80", "goto random-1")
    return Unit(key(number), Family.IPV4, add=(element,))


def refusing(*numbers: int, why: str = "Error: Could not process rule: Numerical result") -> str:
    pattern = "|".join(rf"10\.96\.0\.{number} " for number in numbers)
    return f'if grep -qE "{pattern}" <<< "$script"; then echo "{why}" >&2; exit 1; fi'


@pytest.mark.parametrize(
    ("complaint", "error"),
    [
        ("-:1:1-9: Error: Could not process rule: Device or resource busy", Busy),
        ("netlink: Error: cache initialization failed: No buffer space available", Busy),
        ("-:1:1-9: Error: Could not process rule: No such file or directory", OutOfStep),
        ("-:1:1-9: Error: Could not process rule: File exists", OutOfStep),
        ("-:1:1-9: Error: syntax error, unexpected newline", Rejected),
        ("-:1:1-9: Error: Could not process rule: Operation not supported", Rejected),
        ("", Rejected),
    ],
)
async def test_what_nft_says_decides_the_error(
    fake: Fake, complaint: str, error: type[DataplaneError]
) -> None:
    driver = fake(f'echo "a warning first" >&2; echo "{complaint}" >&2; exit 1')
    with pytest.raises(error) as caught:
        await driver.commit(NftPlan(("add table ip vipd",), ()))
    assert type(caught.value) is error
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("signal", "error"),
    [("ABRT", Rejected), ("SEGV", Rejected), ("KILL", UnknownResult), ("TERM", UnknownResult)],
)
async def test_a_signal_ends_nft(fake: Fake, signal: str, error: type[DataplaneError]) -> None:
    with pytest.raises(error) as caught:
        await fake(f"ulimit -c 0; kill -{signal} $$").commit(NftPlan(("add table ip vipd",), ()))
    assert type(caught.value) is error


async def test_an_nft_that_hangs_is_killed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_module, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(UnknownResult, match="did not end"):
        await fake("exec sleep 1000").commit(NftPlan(("add table ip vipd",), ()))


async def test_a_cancelled_run_is_over_when_it_says_so(fake: Fake, tmp_path: Path) -> None:
    """Else it would write beside whoever comes next."""
    os.mkfifo(tmp_path / "pid")
    run = asyncio.ensure_future(
        fake('echo $$ > "$DIR/pid"; exec sleep 1000').commit(NftPlan(("add table ip vipd",), ()))
    )
    pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_without_nft_nothing_works_and_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    driver = NftablesDriver()
    with pytest.raises(Unsupported, match="nftables"):
        await driver.observe()
    found = await driver.probe()
    assert not found.supported
    assert "nftables" in found.found[0].remedy


async def test_only_the_unit_at_fault_is_rejected(fake: Fake, tmp_path: Path) -> None:
    driver = fake(refusing(3, 6))
    done = await driver.commit(NftPlan(("add table ip vipd",), tuple(map(unit, range(1, 9)))))
    assert set(done.rejected) == {key(3), key(6)}
    assert all(isinstance(one, Rejected) for one in done.rejected.values())
    took = [
        text for text in scripts(tmp_path) if "10.96.0.3 " not in text and "10.96.0.6 " not in text
    ]
    assert any("add table" in text for text in took)
    for number in (1, 2, 4, 5, 7, 8):
        assert sum(f"10.96.0.{number} " in text for text in took) == 1, "done, and once"


async def test_a_crash_is_bisected_like_a_refusal(fake: Fake) -> None:
    driver = fake(
        'if grep -q "10\\.96\\.0\\.2 " <<< "$script"; then ulimit -c 0; kill -ABRT $$; fi'
    )
    done = await driver.commit(NftPlan((), tuple(map(unit, range(1, 6)))))
    assert set(done.rejected) == {key(2)}


async def test_a_prologue_at_fault_is_the_whole_programs(fake: Fake) -> None:
    driver = fake('if grep -q "add table" <<< "$script"; then echo Error: no >&2; exit 1; fi')
    with pytest.raises(Rejected):
        await driver.commit(NftPlan(("add table ip vipd",), (unit(1), unit(2))))


async def test_stray_elements_at_fault_are_nobodys(fake: Fake) -> None:
    stray = Unit(None, Family.IPV4, delete=(Element("services", "10.96.0.9 . tcp . 80", "drop"),))
    committed = await fake(refusing(9)).commit(NftPlan((), (stray, unit(1))))
    assert committed.rejected == {}


async def test_busy_is_no_reason_to_bisect(fake: Fake, tmp_path: Path) -> None:
    driver = fake(refusing(2, why="Error: Device or resource busy"))
    with pytest.raises(Busy):
        await driver.commit(NftPlan((), (unit(1), unit(2))))
    assert len(scripts(tmp_path)) == 1


async def test_large_plans_are_cut_and_whole_ones_are_not(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "LARGEST_TRANSACTION", 2)
    driver = fake("")
    units = tuple(map(unit, range(1, 6)))
    await driver.commit(NftPlan(("add table ip vipd",), units))
    assert [text.count("10.96.0.") for text in scripts(tmp_path)] == [2, 2, 1]
    assert ["add table" in text for text in scripts(tmp_path)] == [True, False, False]
    await driver.commit(NftPlan(("add table ip vipd",), units, whole=True))
    assert scripts(tmp_path)[3].count("10.96.0.") == 5


async def test_an_empty_plan_runs_nothing(fake: Fake, tmp_path: Path) -> None:
    assert (await fake("").commit(NftPlan((), ()))).rejected == {}
    assert scripts(tmp_path) == []


async def test_the_language_of_messages_is_fixed(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    await fake('echo "$LC_ALL" > "$DIR/lang"').commit(NftPlan(("add table ip vipd",), ()))
    assert (tmp_path / "lang").read_text() == "C\n"


async def test_nft_reads_exactly_the_plan(fake: Fake, tmp_path: Path) -> None:
    made, _ = plan(None, compile_program((), NodeNetwork()))
    await fake('echo "$@" > "$DIR/arguments"').commit(made)
    assert scripts(tmp_path) == [str(made).rstrip("\n")]
    assert (tmp_path / "arguments").read_text() == "-f -\n"


async def test_observe_lists_only_our_tables(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {("ip", "vipd"), ("inet", "vipd"), ("ip", "filter"), ("ip6", "kube-proxy")}
    monkeypatch.setattr(tables, "listed", lambda: there)
    driver = fake('echo "$@" >> "$DIR/arguments"\necho \'{"nftables": []}\'')
    assert await driver.observe() is not None
    assert (tmp_path / "arguments").read_text() == "--json list table ip vipd\n"


async def test_teardown_deletes_our_tables_and_says_so(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "listed", lambda: {("ip6", "vipd"), ("ip", "strange")})
    assert await fake("").teardown() == ["table ip6 vipd"]
    assert scripts(tmp_path)[-1] == "delete table ip6 vipd"


LISTED = """
import subprocess
from vipd.backends.nftables.tables import listed

families = ("ip", "ip6", "inet", "arp", "bridge", "netdev")
there = {(family, "vipd") for family in families}
assert listed() == set()
for family, name in there:
    subprocess.run(["nft", "add", "table", family, name], check=True)
assert listed() == there, listed()
subprocess.run(["nft", "delete", "table", "ip", "vipd"], check=True)
assert listed() == there - {("ip", "vipd")}
"""


@pytest.mark.netns
def test_the_tables_that_the_kernel_has() -> None:
    done = subprocess.run(
        ["unshare", "-Urn", sys.executable, "-c", LISTED], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_the_capability_the_kernel_says_nothing() -> None:
    script = "from vipd.backends.nftables.tables import listed\nlisted()"
    command = ["setpriv", "--bounding-set=-net_admin", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Unsupported: CAP_NET_ADMIN" in done.stderr


async def test_busy_garbage_is_removed_by_a_later_commit(fake: Fake, tmp_path: Path) -> None:
    driver = fake('if [ ! -e "$DIR/calm" ]; then echo "Device or resource busy" >&2; exit 1; fi')
    await driver.commit(NftPlan((), (), (Shared(4, "chain", "own-1"), Shared(4, "map", "clients"))))
    (tmp_path / "calm").touch()
    await driver.commit(NftPlan((), (unit(1),)))
    wanted = "flush chain ip vipd own-1\ndelete chain ip vipd own-1\ndelete map ip vipd clients"
    assert scripts(tmp_path)[-1] == wanted
    await driver.commit(NftPlan((), (unit(2),)))
    assert "own-1" not in scripts(tmp_path)[-1]


async def test_plans_may_be_committed_side_by_side(fake: Fake, tmp_path: Path) -> None:
    driver = fake("")
    await asyncio.gather(*(driver.commit(NftPlan((), (unit(n),))) for n in range(1, 6)))
    text = "\n".join(scripts(tmp_path))
    assert "10.96.0." in text


async def test_a_commit_that_is_cancelled_while_it_waits_leaves_no_place_taken(fake: Fake) -> None:
    driver = fake('[ -e "$DIR/go" ] || while [ ! -e "$DIR/go" ]; do read -t 0.01 < <(:); done')
    folder = Path(str(driver._nft.path)).parent
    first = asyncio.create_task(driver.commit(NftPlan((), (unit(1),))))
    await asyncio.sleep(0)  # it has its place now
    waiting = asyncio.create_task(driver.commit(NftPlan(("add table ip vipd",), ())))
    for _ in range(5):
        await asyncio.sleep(0)
    waiting.cancel()
    (folder / "go").touch()
    await first
    await asyncio.gather(waiting, return_exceptions=True)
    assert driver._places._value == driver_module.AT_ONCE
