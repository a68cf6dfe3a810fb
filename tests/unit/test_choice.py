"""Which mode a daemon begins with, and the record that it reads without trust."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vipd.backends.protocol import Capabilities, Capability
from vipd.proxy import choice, record
from vipd.proxy.config import Flags, load
from vipd.proxy.errors import Busy, Unsupported
from vipd.proxy.switch import Drain, Record, State

Works = Callable[..., list[str]]


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Works:
    """Let only these modes work on this host; `asked` holds which were probed."""

    def let(*modes: str, broken: str = "") -> list[str]:
        asked: list[str] = []

        def backend(mode: str, *_: Any) -> Any:
            async def probe() -> Capabilities:
                asked.append(mode)
                if mode == broken:
                    raise Busy("cannot be probed")
                there = Capability(f"{mode}-tool", mode in modes, remedy=f"install {mode}")
                return Capabilities(mode, (there,))

            return SimpleNamespace(
                compiler=SimpleNamespace(mode=mode), driver=SimpleNamespace(probe=probe)
            )

        monkeypatch.setattr(choice, "backend", backend)
        return asked

    return let


def config(mode: str) -> Any:
    return load(Flags(mode=mode, manifests=("x",)))


async def test_auto_takes_the_first_that_works_and_says_why(works: Works) -> None:
    works("nftables", "iptables")
    start = await choice.begin(config("auto"), None)
    assert (start.state.serving, start.chosen) == ("nftables", "nftables")
    assert start.why == "everything that nftables needs is here"
    works("iptables")
    start = await choice.begin(config("auto"), None)
    assert start.state.serving == "iptables"
    assert "no nftables-tool: install nftables" in start.why


async def test_auto_with_nothing_that_works_names_all(works: Works) -> None:
    works(broken="iptables")
    with pytest.raises(Unsupported, match=r"install nftables.*cannot be probed.*install ipvs"):
        await choice.begin(config("auto"), None)


async def test_a_mode_by_name_is_not_probed(works: Works) -> None:
    asked = works()
    start = await choice.begin(config("ipvs"), None)
    assert (start.state.serving, asked) == ("ipvs", [])


async def test_what_auto_chose_stays_while_it_works(works: Works) -> None:
    works("nftables", "iptables")
    left = Record("auto", State("iptables"), "iptables", "no nft then")
    assert await choice.begin(config("auto"), left) == left
    works("nftables")
    start = await choice.begin(config("auto"), left)
    assert start.state.serving == "nftables"
    assert "iptables, which was in use, is gone" in start.why


async def test_a_mode_that_was_switched_to_and_is_gone_gives_way(works: Works) -> None:
    works("nftables")
    left = Record("nftables", State("ipvs", drains=(Drain("nftables", 9.0),)), "nftables")
    start = await choice.begin(config("nftables"), left)
    assert start.state.serving == "nftables"
    assert "ipvs, which was in use, is gone" in start.why


async def test_another_configuration_wins(works: Works) -> None:
    works("nftables")
    left = Record("nftables", State("ipvs"), "nftables")
    start = await choice.begin(config("iptables"), left)
    assert (start.configured, start.state.serving) == ("iptables", "iptables")


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / record.RECORD
    left = Record("auto", State("ipvs", drains=(Drain("nftables", 9.0, 3),)), "nftables", "why")
    record.write(path, left)
    assert record.read(path) == left
    assert [one.name for one in tmp_path.iterdir()] == [record.RECORD]
    assert path.stat().st_mode & 0o077 == 0


def test_a_draft_that_a_crash_left_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / record.RECORD
    (tmp_path / f".{record.RECORD}").write_text("half")
    record.write(path, Record("auto", State("ipvs")))
    assert record.read(path) == Record("auto", State("ipvs"))


def test_a_record_of_an_unknown_mode_is_none(tmp_path: Path) -> None:
    path = tmp_path / record.RECORD
    path.write_bytes(msgspec.json.encode(Record("auto", State("ebpf"))))
    assert record.read(path) is None


def test_a_drain_of_an_unknown_mode_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / record.RECORD
    drains = (Drain("ebpf", 1.0), Drain("ipvs", 2.0))
    state = State("nftables", resumed=Drain("ebpf", 1.0), drains=drains)
    path.write_bytes(msgspec.json.encode(Record("nftables", state)))
    read = record.read(path)
    assert read is not None
    assert read.state == State("nftables", drains=drains[1:])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_record_of_somebody_else_is_none(tmp_path: Path) -> None:
    path = tmp_path / record.RECORD
    record.write(path, Record("auto", State("ipvs")))
    os.chown(path, 65534, 65534)
    assert record.read(path) is None


def test_a_link_is_no_record(tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    record.write(real, Record("auto", State("ipvs")))
    path = tmp_path / record.RECORD
    path.symlink_to(real)
    assert record.read(path) is None
